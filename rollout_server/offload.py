"""`offload_optimizer=True`: the optimizer's state waits in host memory while rollouts are made.

The state's tensors stay the same objects: their storages are emptied and later filled again, so
whoever holds views of them (fused optimizers, DTensors) needs to know nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

_SMALLEST = 1 << 20  # bytes of a block of host memory


def on_accelerator(tensor: torch.Tensor) -> bool:
    return bool(tensor.device.type != "cpu")


class OptimizerOffload:
    """Parks the state of one optimizer. Used by one thread at a time."""

    def __init__(
        self,
        optimizer: Callable[[], Any],
        bring_back: Callable[[], None],
        movable: Callable[[torch.Tensor], bool] = on_accelerator,
    ):
        """optimizer: gives it, or None before it is made; bring_back: called before whatever needs
        the state while it is parked (it calls `restore`); movable: which tensors are worth moving.
        """
        self._optimizer = optimizer
        self._bring_back = bring_back
        self._movable = movable
        self._parked: list[tuple[torch.UntypedStorage, list[torch.Tensor]]] = []
        self._blocks: list[torch.Tensor] = []  # pinned memory is dear to allocate: it is kept
        self._watched: Any = None
        self._hooks = [register_optimizer_step_pre_hook(self._before)]

    @property
    def parked_bytes(self) -> int:
        """Bytes of state in host memory; 0 while it is where the optimizer uses it."""
        return sum(part.numel() for _, parts in self._parked for part in parts)

    @torch.no_grad()
    def park(self) -> None:
        """Move the state to host memory; nothing to do if it is there."""
        optimizer = bare_optimizer(self._optimizer())
        if optimizer is None or self._parked:
            return
        self._watch(optimizer)
        found = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage()
            for tensor in _state(optimizer)
            if self._movable(tensor)
        }
        storages = list(found.values())
        sizes = [storage.nbytes() for storage in storages]
        if sum(map(len, self._blocks)) < sum(sizes):
            self._blocks = []  # first free it
            self._blocks = host_blocks(sum(sizes), pin=torch.cuda.is_available())
        self._parked = list(zip(storages, cut(self._blocks, sizes), strict=True))
        for storage, parts in self._parked:
            for part, piece in _pairs(storage, parts):
                part.copy_(piece, non_blocking=True)
        _finish(storages)
        for storage, _ in self._parked:
            storage.resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the state back; nothing to do if it is where it belongs."""
        for storage, parts in self._parked:
            storage.resize_(sum(map(len, parts)))
            for part, piece in _pairs(storage, parts):
                piece.copy_(part, non_blocking=True)
        _finish(storage for storage, _ in self._parked)
        self._parked = []

    def close(self) -> None:
        """Bring the state back and stop watching."""
        self.restore()
        for hook in self._hooks:
            hook.remove()

    def _watch(self, optimizer: Any) -> None:
        """A checkpoint needs the state too."""
        if self._watched is not optimizer:
            self._watched = optimizer
            self._hooks.append(optimizer.register_state_dict_pre_hook(self._before))

    def _before(self, optimizer: Any, *_: Any) -> None:
        if self._parked and optimizer is self._watched:
            self._bring_back()
            self.restore()


def bare_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper."""
    while optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    inner = getattr(optimizer, "optimizer", None)
    return bare_optimizer(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def _state(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for values in optimizer.state.values():
        for value in values.values() if isinstance(values, dict) else ():
            if isinstance(value, torch.Tensor):
                yield value.to_local() if hasattr(value, "to_local") else value


def host_blocks(nbytes: int, pin: bool) -> list[torch.Tensor]:
    """Host memory for `nbytes` bytes. Blocks of powers of two, since that is what torch rounds
    pinned memory up to: an embedding of 2.1 GB would take 4."""
    sizes, left = [], nbytes
    while left > 0:
        sizes.append(max(_SMALLEST, 1 << (left.bit_length() - 1)))
        left -= sizes[-1]
    return [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for size in sizes]


def cut(blocks: Iterable[torch.Tensor], sizes: Iterable[int]) -> Iterator[list[torch.Tensor]]:
    """For each of `sizes` that many bytes of the blocks, in parts, one after the other."""
    left = iter(blocks)
    block = torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        parts = []
        while size:
            if not len(block):
                block = next(left)
            parts.append(block[:size])
            block, size = block[size:], size - len(parts[-1])
        yield parts


def _pairs(
    storage: torch.UntypedStorage, parts: list[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each part, and those bytes of the storage that it is for."""
    return zip(parts, _bytes(storage).split([len(part) for part in parts]), strict=True)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish(storages: Iterable[torch.UntypedStorage]) -> None:
    for device in {storage.device for storage in storages if storage.device.type == "cuda"}:
        torch.cuda.synchronize(device)
