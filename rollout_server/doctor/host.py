"""The system around: memory, limits, folders, network, clock."""

import time

from rollout_server.doctor.finding import Finding, ok, problem, warning
from rollout_server.doctor.system import Failed, System
from rollout_server.engine.gpu_memory import GIB
from rollout_server.engine.temporary import SOCKET_FOLDER

MIB = 1 << 20
_SHM = "/dev/shm"
_FOLDER = len("/rollout_server-") + 8  # the server's own in the temporary one
_LOCAL = "127.0.0.1"
_PROXIES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
_DAY = 86400


def memory(system: System) -> Finding:
    free = system.memory
    text = f"{free / GIB:.1f} GiB of memory are free"
    if free < 2 * GIB:
        return problem(text, "free some: importing torch and vLLM in two processes takes 2 GiB")
    if free < 4 * GIB:
        return warning(text, "free some, or give a small kv_cache_memory_bytes")
    return ok(text)


def shared_memory_size(system: System) -> Finding:
    try:
        total, free = system.disk(_SHM)
    except OSError as error:
        return problem(f"{_SHM} isn't there: {error}", f"mount -t tmpfs tmpfs {_SHM}")
    text = f"{free / MIB:.0f} of {total / MIB:.0f} MiB of {_SHM} are free"
    if free < 256 * MIB:
        return warning(
            f"{text}: a policy on the CPU can't be shared in place, and each sync copies it once "
            "more; tensor parallel may not start",
            "docker run --shm-size=8g, or --ipc=host",
        )
    return ok(text)


def shared_memory(system: System) -> Finding:
    """The engine opens the trainer's memory at /proc/<pid>/fd, as the same user."""
    try:
        system.round_trip("cpu")
    except Failed as error:
        return problem(
            f"another process can't open this one's memory: {error}",
            "run both as one user; mount /proc without hidepid; in a sandbox (gVisor, a seccomp "
            "profile), allow memfd_create and opening /proc/<pid>/fd",
        )
    return ok("memory can be shared through /proc/<pid>/fd")


def open_files(system: System) -> Finding:
    limit = system.open_files
    shown = "unlimited" if limit < 0 else str(limit)
    if 0 <= limit < 1024:
        return problem(
            f"ulimit -Hn is {shown}", "ulimit -Hn 65536, or docker --ulimit nofile=65536"
        )
    if 0 <= limit < 8192:
        return warning(
            f"ulimit -Hn is {shown}; a connection takes one, and on a CPU so does each tensor",
            "ulimit -Hn 65536, or docker run --ulimit nofile=65536",
        )
    return ok(f"ulimit -Hn is {shown}")


def temporary_folder(system: System) -> Finding:
    folder = system.temporary
    try:
        system.write_temporary()
    except OSError as error:
        return problem(f"{folder} can't be written to: {error}", "set TMPDIR to one that can")
    if len(folder) + _FOLDER > SOCKET_FOLDER:
        return warning(
            f"the temporary folder's name has {len(folder)} characters, too many for sockets: the "
            "server's folder will be in /tmp",
            "set TMPDIR to a short path, or let it be so",
        )
    if system.disk(folder)[1] < 100 * MIB:
        return warning(f"less than 100 MiB are free in {folder}", "free some, or set TMPDIR")
    return ok(f"{folder} can be written to")


def loopback(system: System) -> Finding:
    try:
        system.loopback()
    except OSError as error:
        return problem(
            f"no connection to {_LOCAL}: {error}",
            "bring up lo (ip link set lo up), or allow it in the sandbox",
        )
    return ok(f"{_LOCAL} can be reached")


def proxies(system: System) -> Finding:
    """OpenAI's and Anthropic's clients send everything to a proxy that the environment names."""
    proxy = next((n for n in _PROXIES if system.environment.get(n)), None)
    if proxy is None:
        return ok("no proxy for http")
    spared = [
        host.strip()
        for name in ("NO_PROXY", "no_proxy")
        for host in system.environment.get(name, "").split(",")
    ]
    if "*" in spared or _LOCAL in spared:
        return ok(f"{proxy} is set, and NO_PROXY spares {_LOCAL}")
    return problem(
        f"{proxy} is set without NO_PROXY for {_LOCAL}: clients ask the proxy for this server",
        f"export NO_PROXY={_LOCAL},localhost and no_proxy as well (httpx takes no 127.0.0.0/8)",
    )


def clock(system: System) -> Finding:
    if system.now < system.installed_at - _DAY:
        return warning(
            f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(system.now))}, before this was "
            "installed",
            "set it (timedatectl set-ntp true): certificates and logs go by it",
        )
    return ok(f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(system.now))}")


CHECKS = [
    memory,
    shared_memory_size,
    shared_memory,
    open_files,
    temporary_folder,
    loopback,
    proxies,
    clock,
]
