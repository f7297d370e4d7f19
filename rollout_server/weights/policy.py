"""What a server needs to know of the policy it serves, whichever trainer owns it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout_server.weights.sources.base import Source, architecture
from rollout_server.weights.sources.known import Sources

# Nothing cut off, nothing reshaped: the distribution that the policy's own logits give.
NEUTRAL_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Policy:
    """What is served: a model, and all that its trainer tells of it.

    model: gives the model as it is now; trainers rebind theirs when they wrap it.
    tokenizer: tokenizer or processor, with the chat template.
    owner: what may hold one server at a time: the trainer, or the model.
    compute_dtype: name of the dtype the trainer computes in; None: that of its parameters.
    sampling: sampling fields by the trainer's settings.
    seed: of the engine's sampler; differs between ranks.
    optimizer: gives the optimizer, or None while there is none.
    optimizer_name: transformers' name of the one that will be made; None: not known.
    shards: over how many ranks the trainer will divide the model, which it has in full now.
    """

    model: Callable[[], Any]
    tokenizer: Any
    owner: Any
    compute_dtype: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=lambda: dict(NEUTRAL_SAMPLING))
    seed: int = 0
    optimizer: Callable[[], Any] | None = None
    optimizer_name: str | None = None
    shards: int = 1
    _sources: Sources = field(default_factory=Sources, init=False, repr=False, compare=False)

    def source(self, peft: str) -> Source:
        """The policy's tensors as they are now; peft: "merge" or "adapter"."""
        return self._sources.of(self.model(), peft)

    def stamp(self, looked: bool = False) -> list[tuple[int, int]]:
        """Differs where a parameter has been written to, or replaced; looked: not replaced since
        the last `source`."""
        return [(id(p), p._version) for p in self._sources.parameters(self.model(), looked)]

    @property
    def bare(self) -> torch.nn.Module:
        return architecture(self.model())

    @property
    def dtype(self) -> str:
        """What "auto" stands for: "float32", "bfloat16" or "float16"."""
        return self.compute_dtype or next(
            (
                str(p.dtype).removeprefix("torch.")
                for p in self.bare.parameters()
                if p.is_floating_point()
            ),
            "float32",
        )

    @property
    def gpu(self) -> int | None:
        """Index of the policy's GPU as torch counts, None without one. A model that its trainer
        will move there, as FSDP's does, is counted to the process's current one."""
        device = next(iter(self.bare.parameters())).device
        if device.type == "cuda":
            index: int = device.index
            return index
        return torch.cuda.current_device() if torch.cuda.is_available() else None

    @property
    def base_name(self) -> str | None:
        """The name the model was loaded under."""
        return getattr(getattr(self.bare, "config", None), "_name_or_path", None) or None

    @property
    def chat_template(self) -> Any:
        return getattr(self.tokenizer, "chat_template", None)
