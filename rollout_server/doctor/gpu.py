"""The GPU, its driver, and what trainer and engine do with it. Without one all of it is ok."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from rollout_server.doctor.finding import Finding, ok, problem, warning
from rollout_server.doctor.system import Failed, System
from rollout_server.engine.gpu_memory import GIB

_SCARCE = 4 * GIB
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def visible(system: System) -> Finding:
    gpus, hidden = _gpus(system), system.environment.get("CUDA_VISIBLE_DEVICES")
    if gpus:
        names = ", ".join(gpu["name"] for gpu in gpus)
        return ok(f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}: {names}")
    if not system.nvidia:
        return ok("no NVIDIA GPU; the engine runs on the CPU")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return warning(
            f"there is a GPU, hidden by CUDA_VISIBLE_DEVICES={hidden!r}",
            "unset CUDA_VISIBLE_DEVICES to use it",
        )
    cuda = _of_torch(system, "cuda")
    if cuda is None:
        return warning("there is a GPU that torch isn't built for", "install torch's CUDA build")
    return problem(
        f"there is a GPU, but torch (CUDA {cuda}) sees none",
        "update the NVIDIA driver; in a container start it with --gpus all",
    )


def driver(system: System) -> Finding:
    if not system.nvidia:
        return ok("no NVIDIA driver needed")
    version, newest, cuda = system.driver, system.driver_cuda, _of_torch(system, "cuda")
    if cuda and newest and int(cuda.split(".")[0]) > newest[0]:
        return problem(
            f"NVIDIA driver {version} is for CUDA up to {newest[0]}.{newest[1]}, torch is built "
            f"for {cuda}",
            f"update the driver, or install a torch for CUDA {newest[0]}",
        )
    return ok(f"NVIDIA driver {version}" + (f", CUDA {newest[0]}.{newest[1]}" if newest else ""))


def _with_gpu(check: Callable[[System], Finding]) -> Callable[[System], Finding]:
    @wraps(check)
    def checked(system: System) -> Finding:
        return check(system) if _gpus(system) else ok(f"{check.__doc__}: no GPU to check")

    return checked


@_with_gpu
def memory(system: System) -> Finding:
    """GPU memory"""
    gpu = min(_gpus(system), key=lambda gpu: gpu["free"])
    text = f"{gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB of GPU memory are free"
    if gpu["free"] < _SCARCE or gpu["free"] < gpu["total"] / 2:
        return warning(
            text,
            "end the other processes on it (nvidia-smi lists them), or choose another GPU "
            "with CUDA_VISIBLE_DEVICES",
        )
    return ok(text)


@_with_gpu
def ipc(system: System) -> Finding:
    """CUDA IPC"""
    try:
        system.round_trip("cuda")
    except Failed as error:
        return problem(
            f"another process can't open this one's GPU memory: {error}",
            "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF; in a container, run trainer and "
            "engine in one with --ipc=host; CUDA IPC isn't there under WSL and MIG's older drivers",
        )
    return ok("CUDA IPC works")


@_with_gpu
def pinned(system: System) -> Finding:
    """pinned host memory"""
    limit = system.locked_memory
    shown = "unlimited" if limit < 0 else f"{limit >> 10} KiB"
    try:
        system.pins()
    except Failed as error:
        return problem(
            f"256 MiB of host memory can't be pinned (ulimit -l: {shown}): {error}",
            "ulimit -l unlimited, or docker run --ulimit memlock=-1; offload_optimizer needs it",
        )
    return ok(f"host memory can be pinned (ulimit -l: {shown})")


def allocator(system: System) -> Finding:
    for name in ALLOCATOR:
        value = system.environment.get(name, "")
        if "expandable_segments:true" in value.replace(" ", "").lower():
            return warning(
                f"{name}={value}: memory in expandable segments can't be opened by the engine",
                f"set expandable_segments:False in {name}",
            )
    return ok("no expandable segments")


def _gpus(system: System) -> list[dict[str, Any]]:
    return _of_torch(system, "gpus") or []


def _of_torch(system: System, name: str) -> Any:
    """None where torch can't be asked."""
    try:
        return system.torch[name]
    except Failed:
        return None


CHECKS = [visible, driver, memory, ipc, pinned, allocator]
