"""Ways to copy the bytes of a model at once, of which the fastest is what a sync is compared with.

On a CPU: torch's own copy, with all of its threads, and as many threads that call the C library's
with pieces of several sizes. From `STREAMED_BYTES` on that goes past the cache, if this process was
started as `environment` says.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from rollout_server.engine.arguments import glibc_tunables
from rollout_server.weights.wire import STREAMED_BYTES

_PIECES = {"cached": STREAMED_BYTES - 4096, "1 MiB": 1 << 20, "4 MiB": 4 << 20, "16 MiB": 16 << 20}


def environment() -> dict[str, str]:
    """For a process that has all ways."""
    tunables = glibc_tunables(os.environ.get("GLIBC_TUNABLES", ""))
    return os.environ | {"GLIBC_TUNABLES": tunables}


class Copies:
    """Between flat tensors of `nbytes` bytes, with the dtype and the device of `like`."""

    def __init__(self, nbytes: int, like: torch.Tensor):
        count = nbytes // like.element_size()
        self._source = torch.ones(count, dtype=like.dtype, device=like.device)
        self._to = torch.zeros_like(self._source)
        self._ways: dict[str, Callable[[], None]] = {"copy_": self._copy}
        if like.device.type == "cpu":
            self._threads = ThreadPoolExecutor(torch.get_num_threads())
            for name, size in _PIECES.items():
                self._ways[f"memmove, {name}"] = self._memmove(size)
        self.seconds: dict[str, list[float]] = {name: [] for name in self._ways}
        for work in self._ways.values():  # pages are there from the first write on
            work()

    def measure(self) -> None:
        """Each way once more."""
        for name, work in self._ways.items():
            started = time.perf_counter()
            work()
            self.seconds[name].append(time.perf_counter() - started)

    @property
    def fastest(self) -> list[float]:
        """Seconds of the way with the least median."""
        return min(self.seconds.values(), key=statistics.median)

    def _copy(self) -> None:
        self._to.copy_(self._source)
        if self._to.is_cuda:
            torch.cuda.synchronize()

    def _memmove(self, size: int) -> Callable[[], None]:
        to, source, total = self._to.data_ptr(), self._source.data_ptr(), self._to.nbytes
        pieces = [(to + at, source + at, min(size, total - at)) for at in range(0, total, size)]

        def run() -> None:
            left = iter(pieces)

            def work(_: int) -> None:
                for piece in left:
                    ctypes.memmove(*piece)

            list(self._threads.map(work, range(torch.get_num_threads())))

        return run
