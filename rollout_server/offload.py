"""`offload_optimizer=True`: the optimizer's state waits in host memory while rollouts are made.

The state's tensors stay the same objects: their storages are emptied and later filled again, so
whoever holds views of them (fused optimizers, DTensors) needs to know nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


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
        self._parked: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self._host: dict[int, torch.Tensor] = {}  # pinned memory is dear to allocate: it is kept
        self._watched: Any = None
        self._hooks = [register_optimizer_step_pre_hook(self._before)]

    @property
    def parked_bytes(self) -> int:
        """Bytes of state in host memory; 0 while it is where the optimizer uses it."""
        return sum(host.numel() for _, host in self._parked)

    @torch.no_grad()
    def park(self) -> None:
        """Move the state to host memory; nothing to do if it is there."""
        optimizer = _bare(self._optimizer())
        if optimizer is None or self._parked:
            return
        self._watch(optimizer)
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage()
            for tensor in _state(optimizer)
            if self._movable(tensor)
        }
        hosts = {}
        for key, storage in storages.items():
            host = self._host.get(key)
            if host is None or host.numel() != storage.nbytes():
                pin = torch.cuda.is_available()
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin)
            host.copy_(_bytes(storage), non_blocking=True)
            hosts[key] = host
        _finish(storages.values())
        self._host = hosts
        self._parked = [(storage, hosts[key]) for key, storage in storages.items()]
        for storage, _ in self._parked:
            storage.resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the state back; nothing to do if it is where it belongs."""
        for storage, host in self._parked:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
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


def _bare(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper."""
    while optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    inner = getattr(optimizer, "optimizer", None)
    return _bare(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def _state(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for values in optimizer.state.values():
        for value in values.values() if isinstance(values, dict) else ():
            if isinstance(value, torch.Tensor):
                yield value.to_local() if hasattr(value, "to_local") else value


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish(storages: Iterable[torch.UntypedStorage]) -> None:
    for device in {storage.device for storage in storages if storage.device.type == "cuda"}:
        torch.cuda.synchronize(device)
