"""Many copies at the speed of one. Runs in the engine's process.

On a GPU they are one `torch._foreach_copy_`. On a CPU that would be a parallel region of OpenMP per
tensor, each as slow as its slowest thread, and the trainer's own threads still spin on the cores;
there, threads of our own take pieces of memory off one list, and no thread waits for another.
"""

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_PIECE = 4 << 20  # bytes that a thread takes at once


class Copier:
    """Copies `sources` to `to`, pairwise, as often as `run` is called.

    The tensors must stay where they are meanwhile; a pair has one shape, dtypes may differ.
    """

    def __init__(self, to: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]):
        pairs = list(zip(to, sources, strict=True))
        raw = [pair for pair in pairs if _is_memory(*pair)]
        other = [pair for pair in pairs if not _is_memory(*pair)]
        self._keep = raw  # their addresses are in use
        self._to, self._sources = [p[0] for p in other], [p[1] for p in other]
        self._pieces = [piece for pair in raw for piece in _pieces(*pair)]
        # The largest first, so that the threads end together.
        self._pieces.sort(key=lambda piece: piece[2], reverse=True)

    def run(self) -> None:
        if self._to:
            torch._foreach_copy_(self._to, self._sources)
        if self._pieces:
            left, lock = iter(self._pieces), threading.Lock()
            threads = _threads()
            list(threads.map(lambda _: _work(left, lock), range(threads._max_workers)))


def _is_memory(to: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the copy is one of consecutive bytes in host memory."""
    return bool(
        to.device.type == source.device.type == "cpu"
        and to.dtype == source.dtype
        and to.is_contiguous()
        and source.is_contiguous()
    )


def _pieces(to: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(to, from, bytes), addresses."""
    size = to.numel() * to.element_size()
    for at in range(0, size, _PIECE):
        yield to.data_ptr() + at, source.data_ptr() + at, min(_PIECE, size - at)


def _work(left: Iterator[tuple[int, int, int]], lock: threading.Lock) -> None:
    while True:
        with lock:
            piece = next(left, None)
        if piece is None:
            return
        ctypes.memmove(*piece)  # without the GIL


_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        # vLLM pins its threads to one core each, which threads that they start inherit; the
        # trainer, whose memory this is, is where it may be.
        cores = os.sched_getaffinity(os.getppid())
        _pool = ThreadPoolExecutor(
            max(1, min(len(cores), torch.get_num_threads())),
            "rollout-copy",
            initializer=lambda: os.sched_setaffinity(0, cores),
        )
    return _pool
