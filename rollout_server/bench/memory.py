"""Memory of the trainer and the engine, in bytes."""

import contextlib
import ctypes
import gc
import os

import psutil
import torch


def memory(engine_pid: int | None = None) -> dict[str, int]:
    """`trainer` and `engine`: proportional set size on the host, in which a page that both map
    counts half for each; `..._resident`: in which it counts for both; `device`: GPU memory in use,
    by whomever. `together`: host memory of both, each page once."""
    _trim()
    told = _host("trainer", psutil.Process(os.getpid()), descend=False)
    if engine_pid is not None:
        told |= _host("engine", psutil.Process(engine_pid), descend=True)
    told["together"] = told["trainer"] + told.get("engine", 0)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        told["device"] = total - free
    return told


def _host(name: str, process: psutil.Process, descend: bool) -> dict[str, int]:
    told = {name: 0, f"{name}_resident": 0}
    for one in [process, *(process.children(recursive=True) if descend else ())]:
        with contextlib.suppress(psutil.NoSuchProcess):
            full = one.memory_full_info()
            told[name] += full.pss
            told[f"{name}_resident"] += full.rss
    return told


def _trim() -> None:
    """Give back what the trainer has freed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries than glibc
        ctypes.CDLL(None).malloc_trim(0)
