"""What the checks read. Their tests put another one in its place."""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil

from rollout_server.observability import machine

_PATIENCE = 180  # seconds for a program; importing vLLM on a cold disk takes long
# Programs for another process, which a broken library may end: each prints one line of JSON.
_TORCH = """
import json, torch
told = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        told["gpus"].append({"name": name, "free": free, "total": total})
print(json.dumps(told))
"""
_VLLM = """
import json, vllm
from vllm.platforms import current_platform
print(json.dumps({"version": vllm.__version__, "cpu": current_platform.is_cpu()}))
"""
_IMPORT = "import {name}; print('{{}}')"
_PINNED = "import torch; torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True); print('{}')"
_ROUND_TRIP = "from rollout_server.doctor.round_trip import main; main({device!r})"


class Failed(Exception):
    """A program ended badly; the message is the last line that it wrote."""


class System:
    """This machine, this installation. Methods raise `Failed` or `OSError` for what can't be."""

    python = sys.version_info[:3]
    platform = platform.system()
    environment = os.environ

    def installed(self, name: str) -> str | None:
        """Version of a distribution, None if it isn't there."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requirements(self, name: str) -> list[str]:
        """What a distribution says that it needs."""
        return importlib.metadata.requires(name) or []

    @functools.cached_property
    def torch(self) -> dict[str, Any]:
        """version; cuda: of the build, None for a CPU build; gpus: name, free and total bytes."""
        return self._run(_TORCH)

    @functools.cached_property
    def vllm(self) -> dict[str, Any]:
        """version; cpu: whether it computes on the CPU."""
        return self._run(_VLLM)

    def imports(self, name: str) -> None:
        self._run(_IMPORT.format(name=name))

    def pins(self) -> None:
        """256 MiB of pinned host memory."""
        self._run(_PINNED)

    def round_trip(self, device: str) -> None:
        """A tensor opened by another process, as at a sync; device: "cpu" or "cuda"."""
        self._run(_ROUND_TRIP.format(device=device))

    @property
    def nvidia(self) -> bool:
        """Whether the system shows an NVIDIA GPU, whatever torch thinks."""
        with contextlib.suppress(OSError):
            return any(re.fullmatch(r"nvidia\d+", name) for name in os.listdir("/dev"))
        return False

    @property
    def driver(self) -> str | None:
        return machine.driver()

    @functools.cached_property
    def driver_cuda(self) -> tuple[int, int] | None:
        """The newest CUDA that the driver knows, by nvidia-smi."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            told = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
            if found := re.search(r"CUDA (?:\w+ )?Version:\s*(\d+)\.(\d+)", told):
                return int(found[1]), int(found[2])
        return None

    @property
    def memory(self) -> int:
        """Bytes that are free."""
        return psutil.virtual_memory().available

    def disk(self, path: str) -> tuple[int, int]:
        """(all, free) bytes."""
        usage = shutil.disk_usage(path)
        return usage.total, usage.free

    @property
    def open_files(self) -> int:
        """How many a process may raise its limit to; -1: no limit."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    @property
    def locked_memory(self) -> int:
        """Bytes that a process may lock; -1: no limit."""
        return resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]

    @property
    def temporary(self) -> str:
        return tempfile.gettempdir()

    def write_temporary(self) -> None:
        with tempfile.TemporaryDirectory(prefix="rollout_server-") as folder:
            with open(os.path.join(folder, "x"), "w") as f:
                f.write("x")
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(os.path.join(folder, "s"))

    def loopback(self) -> None:
        """A connection to a port of 127.0.0.1."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()

    @property
    def now(self) -> float:
        return time.time()

    @property
    def installed_at(self) -> float:
        """When this package's files were written, at the latest."""
        return os.stat(__file__).st_mtime

    def _run(self, code: str) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=_PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {_PATIENCE} s") from None
        told = done.stdout.strip().splitlines()
        if done.returncode == 0 and told:
            answer: dict[str, Any] = json.loads(told[-1])
            return answer
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failed(lines[-1].strip() if lines else f"ended with status {done.returncode}")
