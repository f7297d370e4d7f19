"""Many copies at the speed of one. Runs in the engine's process.

On a CPU an operation of torch would be a parallel region of OpenMP per tensor, each as slow as its
slowest thread, and the trainer's own threads still spin on the cores; there, threads of our own
take pieces of memory off one list, and no thread waits for another. A GPU is given few launches.
"""

import ctypes
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from rollout_server.weights.wire import STREAMED_BYTES

_PAGE = 4096
_PIECE = 4 << 20  # bytes that a thread takes at once
# A load waits for a store to an address before its own with the same last 12 bits, for long if that
# goes past the cache; from so many bytes on it doesn't.
_APART = 1024
_ALONE = 1 << 20  # bytes from which a copy on a GPU is worth a launch

_Pair = tuple[torch.Tensor, torch.Tensor]
_Memory = tuple[int, int, int]  # to, from, bytes: addresses


class Copier:
    """Copies `sources` to `to`, pairwise, as often as `run` is called.

    The tensors must stay where they are meanwhile; a pair has one shape, dtypes may differ.
    """

    def __init__(self, to: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]):
        raw: list[_Pair] = []
        self._large: list[_Pair] = []
        groups: dict[tuple[object, ...], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for pair in zip(to, sources, strict=True):
            if _is_memory(*pair):
                raw.append(pair)
            elif _is_bytes(*pair) and pair[0].nbytes >= _ALONE:
                self._large.append(pair)
            else:
                group = groups.setdefault(_kind(*pair), ([], []))
                group[0].append(pair[0])
                group[1].append(pair[1])
        self._groups = list(groups.values())
        self._keep = raw  # their addresses are in use
        self._shares = _shares([piece for pair in raw for piece in _pieces(*pair)])

    def run(self) -> None:
        for to, source in self._large:
            to.copy_(source)
        for many, sources in self._groups:
            torch._foreach_copy_(many, sources)
        if self._shares:
            left, lock = iter(self._shares), threading.Lock()
            threads = _threads()
            list(threads.map(lambda _: _work(left, lock), range(threads._max_workers)))


def _is_bytes(to: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the copy is one of consecutive bytes."""
    same = to.device.type == source.device.type and to.dtype == source.dtype
    return same and to.is_contiguous() and source.is_contiguous()


def _is_memory(to: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether it is one of consecutive bytes in host memory."""
    return to.device.type == "cpu" and _is_bytes(to, source)


def _kind(to: torch.Tensor, source: torch.Tensor) -> tuple[object, ...]:
    """The same for pairs that torch copies alike: one that is laid out otherwise than its source
    has all of a list's copied one by one."""
    alike = to.is_contiguous() and source.is_contiguous()
    return to.device, source.device, to.dtype, source.dtype, alike


def _pieces(to: torch.Tensor, source: torch.Tensor) -> Iterator[_Memory]:
    """Of equal size, and small enough for the cache where going past it is slow."""
    size, first, other = to.nbytes, to.data_ptr(), source.data_ptr()
    if not size:
        return
    apart = (first - other) % _PAGE
    most = STREAMED_BYTES - _PAGE if 0 < apart < _APART else _PIECE
    each = -(-size // math.ceil(size / most))
    each = -(-each // _PAGE) * _PAGE
    for at in range(0, size, each):
        yield first + at, other + at, min(each, size - at)


def _shares(pieces: list[_Memory]) -> list[list[_Memory]]:
    """What a thread takes at once: a large piece, or many small ones. The largest come first, so
    that the threads end together."""
    shares: list[list[_Memory]] = []
    room = 0
    for piece in sorted(pieces, key=lambda piece: piece[2], reverse=True):
        if piece[2] > room:
            shares.append([])
            room = STREAMED_BYTES
        shares[-1].append(piece)
        room -= piece[2]
    return shares


def _work(left: Iterator[list[_Memory]], lock: threading.Lock) -> None:
    while True:
        with lock:
            share = next(left, None)
        if share is None:
            return
        for piece in share:
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
