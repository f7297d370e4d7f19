"""The memory that a trainer and its engine have in turns, or at once."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from rollout_server.config import RolloutConfig
from rollout_server.offload import OptimizerOffload
from rollout_server.weights.exports import Exports, give_back
from rollout_server.weights.policy import Policy
from rollout_server.weights.shared import SharedWeights, require_shareable
from rollout_server.weights.sources.base import Source


class Colocation:
    """Of one server. shared: one memory for both, with colocate="share"; None otherwise."""

    def __init__(self, policy: Policy, config: RolloutConfig, source: Source, exports: Exports):
        """source: the policy's tensors; `ConfigError` if they can't be shared and must be. exports:
        takes what is shared."""
        self._optimizer = policy.optimizer if config.offload_optimizer else None
        self._offload: OptimizerOffload | None = None
        self.shared: SharedWeights | None = None
        if config.colocate == "share":
            require_shareable(source)
            self.shared = SharedWeights(exports)

    def beside_start(
        self, folder: str, source: Source | None = None
    ) -> AbstractContextManager[None]:
        """While an engine starts; without `source` for one that takes another's place.

        What the trainer's allocator holds for later is given back first: vLLM measures what is free
        at its start, and takes what changes meanwhile for its own. folder: of the server.
        """
        give_back()
        if self.shared is None:
            return contextlib.nullcontext()
        return self.shared.answering(folder, {} if source is None else source.tensors)

    def before_each_step(self, rest: Callable[[], None]) -> list[Callable[[], None]]:
        """With common memory, or an optimizer whose state is parked, a step finds the engine asleep
        by calling `rest`. What undoes this."""
        undo: list[Callable[[], None]] = []
        if self.shared is not None:
            undo.append(self.shared.before_each_step(rest))
        if self._optimizer is not None:
            self._offload = OptimizerOffload(self._optimizer, rest)
            undo.append(self._offload.close)
        return undo

    def make_room(self) -> None:
        """What the trainer doesn't need now is the engine's."""
        if self._offload is not None:
            self._offload.park()
        give_back()

    def take_back(self) -> None:
        """The engine has given its memory back: the optimizer's state is where it is used."""
        if self._offload is not None:
            self._offload.restore()

    @property
    def parked(self) -> dict[str, int]:
        """Bytes of the `optimizer`'s state in host memory, with offload_optimizer."""
        return {} if self._offload is None else {"optimizer": self._offload.parked_bytes}
