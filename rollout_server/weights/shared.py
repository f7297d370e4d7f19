"""`colocate="share"`: the trainer's side of one memory for both (see `worker/sharing.py`).

The policy's parameters stay the same objects; their `data` becomes views of memory that is laid out
as the engine computes with it. An optimizer step writes there, so the engine must be at rest then.
"""

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rollout_server.errors import ConfigError
from rollout_server.weights.exports import Exports, give_back
from rollout_server.weights.sources.base import Source
from rollout_server.weights.transport import Handle, handle, shared_empty
from rollout_server.weights.wire import ADDRESS, Layout


def require_shareable(source: Source) -> None:
    """`ConfigError` for a policy whose tensors aren't there in full, as the engine needs them."""
    if source.collective:
        raise ConfigError(
            "colocate='share': the policy is sharded over several ranks, none of which holds what "
            "an engine computes with; use colocate='sleep'"
        )
    if source.staged_from is not None:
        raise ConfigError(
            "colocate='share' with peft='merge': merged weights are other numbers than the "
            "trainer's; use peft='adapter', which shares the base, or colocate='sleep'"
        )


class SharedWeights:
    """The memory that the policy and the engine have in common; empty until the engine asks."""

    def __init__(self, exports: Exports | None = None) -> None:
        """exports: takes what is given to the engine."""
        self._exports = exports or Exports()
        self._views: dict[str, torch.Tensor] = {}
        self._layout: Layout | None = None
        self._slots: list[torch.Tensor] = []
        self.copied: list[str] = []

    @contextlib.contextmanager
    def answering(self, folder: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While the engine starts: move `tensors` to where it asks, and tell it the handles. One
        that takes another's place asks for the same, where they are.

        folder: of the server; takes the address and its key.
        """
        key = secrets.token_bytes(32)
        address = f"\0rollout_server-{secrets.token_hex(16)}"  # abstract: no file, any length
        with Listener(address, "AF_UNIX", authkey=key) as listener:
            path = os.path.join(folder, ADDRESS)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as f:
                json.dump({"address": address, "key": key.hex()}, f)
            answer = threading.Thread(target=self._answer, args=(listener, tensors), daemon=True)
            answer.start()
            try:
                yield
            finally:
                os.remove(path)
                if answer.is_alive():  # nobody has asked: the engine didn't come that far
                    with contextlib.suppress(Exception):
                        Client(address, "AF_UNIX", authkey=key).close()

    def _answer(self, listener: Listener, tensors: Mapping[str, torch.Tensor]) -> None:
        with contextlib.suppress(OSError, EOFError), listener.accept() as engine:
            try:
                version, layout = engine.recv()
                if version != torch.__version__:
                    raise RuntimeError(
                        f"the trainer has torch {torch.__version__}, the engine {version}; install "
                        "one torch for both"
                    )
                engine.send(self._move(layout, tensors))
            except Exception as error:
                _say(engine, f"{type(error).__name__}: {error}")

    @torch.no_grad()
    def _move(self, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> list[Handle]:
        """Allocate, copy, rebind; slot by slot, so that little is there twice."""
        if self._layout is not None:
            if layout != self._layout:
                raise RuntimeError("the engine wants another layout than the one before it")
            return self._handles()
        inside: dict[int, list[str]] = {}
        for name, place in layout.places.items():
            inside.setdefault(place.slot, []).append(name)
        device = next(iter(tensors.values())).device
        for number, slot in enumerate(layout.slots):
            memory = shared_empty((slot.size,), getattr(torch, slot.dtype), device)
            filled = sum(tensors[name].numel() for name in inside.get(number, ()))
            if filled < slot.size:  # padding
                memory.zero_()
            for name in inside.get(number, ()):
                _, offset, shape, stride = layout.places[name]
                view = memory.as_strided(shape, stride, offset)
                self._views[name] = view
                view.copy_(tensors[name])
                tensors[name].data = view
            self._slots.append(memory)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the engine reads next
            give_back()
        self.copied, self._layout = layout.copied, layout
        return self._handles()

    def _handles(self) -> list[Handle]:
        handles = [handle(memory.untyped_storage()) for memory in self._slots]
        self._exports.give(ADDRESS, handles)
        return handles

    def left(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of what has left the common memory."""
        return [
            name
            for name, view in self._views.items()
            if (tensor := tensors[name]).data_ptr() != view.data_ptr()
            or tensor.stride() != view.stride()
        ]

    @torch.no_grad()
    def refresh(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Bring back what has left the common memory, as when `data` is replaced.

        Returns (bytes, tensors) copied.
        """
        copied = number = 0
        for name in self.left(tensors):
            tensor, view = tensors[name], self._views[name]
            view.copy_(tensor)
            copied, number = copied + view.numel() * view.element_size(), number + 1
            if tensor.device == view.device:
                tensor.data = view
        return copied, number

    def finish(self) -> None:
        """Wait for what the trainer's device still writes."""
        for device in {view.device for view in self._views.values() if view.is_cuda}:
            torch.cuda.synchronize(device)

    @property
    def holds_all(self) -> bool:
        """Whether there is nothing but what is in the common memory."""
        return not self.copied

    def rest(self, source: Source) -> Source:
        """What of `source` isn't in the common memory."""
        return source.only(self.copied)

    def before_each_step(self, work: Callable[[], None]) -> Callable[[], None]:
        """Call `work` before any optimizer writes into the common memory; returns the undoing."""
        pointers = {view.data_ptr() for view in self._views.values()}

        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            groups = optimizer.param_groups
            if any(p.data_ptr() in pointers for group in groups for p in group["params"]):
                work()

        undo: Callable[[], None] = register_optimizer_step_pre_hook(hook).remove
        return undo


def _say(engine: Connection, text: str) -> None:
    with contextlib.suppress(OSError):
        engine.send(text)
