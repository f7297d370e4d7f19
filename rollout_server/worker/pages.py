"""A CPU engine's parameters at the beginning of pages, huge ones where the system has them. Runs in
the engine's process.

torch's allocator has a tensor begin 64 bytes into a page, or anywhere. The trainer's, in shared
memory, begin with one, and a copy from there that goes past the cache takes three times as long if
it isn't to the same place in a page (see copier.py).
"""

import contextlib
import mmap

import torch

from rollout_server.weights.storages import identity

_HUGE = 2 << 20
_LEAST = 1 << 16  # bytes; a smaller storage stays where it is


@torch.no_grad()
def move_to_pages(model: torch.nn.Module) -> None:
    """Give each of the model's parameters memory of its own pages, with what it holds. Before
    anything has its address."""
    moved: dict[int, torch.UntypedStorage] = {}
    for parameter in list(model.parameters()):
        storage = parameter.untyped_storage()
        if storage.nbytes() < _LEAST:
            continue
        known = moved.get(identity(parameter))
        if known is None:
            known = moved[identity(parameter)] = paged(storage.nbytes())
            known.copy_(storage)
        empty = torch.empty(0, dtype=parameter.dtype)
        offset = parameter.storage_offset()
        parameter.data = empty.set_(known, offset, parameter.shape, parameter.stride())


def paged(nbytes: int) -> torch.UntypedStorage:
    """Zeroed memory that begins with a page, and with a huge one if it is as large."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=private)  # what isn't touched takes no memory
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    if nbytes >= _HUGE:
        with contextlib.suppress(OSError, AttributeError):  # a system without
            memory.madvise(mmap.MADV_HUGEPAGE, begin, nbytes // _HUGE * _HUGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=begin)
    return whole.untyped_storage()
