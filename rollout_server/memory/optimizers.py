"""How much state an optimizer will have, before its first step.

torch's own optimizers take that step on the meta device, where nothing is allocated: their state
is what their code makes, options included. Those whose step looks at values have a formula here.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout_server.errors import ConfigError

_BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit states
_SMALL = 4096  # it keeps smaller tensors in 32 bits

Shape = Sequence[int]
Group = tuple[Mapping[str, Any], list[torch.Tensor]]


@dataclass(frozen=True)
class Optimizer:
    """kind: its class, or the name of one that needs no import; groups: as `param_groups`, options
    and parameters; known: False if it is only assumed."""

    kind: type[torch.optim.Optimizer] | str
    groups: list[Group] = field(repr=False)
    known: bool = True

    @property
    def name(self) -> str:
        return self.kind if isinstance(self.kind, str) else self.kind.__name__

    def state_bytes(self) -> int:
        """Of all tensors in its state, after the first step."""
        formula = _FORMULAS.get(self.name)
        if formula is not None and not _is_torchs(self.kind):
            return sum(
                formula(tuple(p.shape), options) for options, params in self.groups for p in params
            )
        with contextlib.suppress(Exception):
            return _after_a_step(self.kind, self.groups)
        logging.getLogger("rollout_server").debug("%s: reckoned as AdamW", self.name)
        return 2 * sum(p.numel() * p.element_size() for _, params in self.groups for p in params)


_NAMES: Mapping[str, tuple[type[torch.optim.Optimizer] | str, Mapping[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adafactor": ("Adafactor", {}),
    "lion": ("Lion", {}),
    "adamw8bit": ("AdamW8bit", {}),
}
NAMES = tuple(_NAMES)


def by_name(name: str, parameters: Iterable[torch.Tensor]) -> Optimizer:
    """One of `NAMES` for the parameters that require gradients; `ConfigError` for another name."""
    if name not in _NAMES:
        raise ConfigError(f"optimizer {name!r}: give one of {', '.join(_NAMES)}")
    kind, options = _NAMES[name]
    return Optimizer(kind, [(options, trained(parameters))])


def of_trainers_name(name: str | None, parameters: Iterable[torch.Tensor]) -> Optimizer:
    """By transformers' name of it (`TrainingArguments.optim`), "adamw_torch_fused" for one. What
    isn't known is taken to be AdamW."""
    words = (name or "").lower().removeprefix("paged_")
    known = next((ours for ours in ("adamw", *NAMES) if words.startswith(ours)), None)
    if known == "adamw" and "8bit" in words:
        known = "adamw8bit"
    found = by_name(known or "adamw", parameters)
    return Optimizer(found.kind, found.groups, known is not None)


def of_object(optimizer: torch.optim.Optimizer) -> Optimizer:
    """A live optimizer's."""
    groups: list[Group] = [
        ({k: v for k, v in group.items() if k != "params"}, trained(group["params"]))
        for group in optimizer.param_groups
    ]
    return Optimizer(type(optimizer), groups)


def trained(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those that require gradients, each once."""
    return list({id(p): p for p in parameters if p.requires_grad}.values())


def here(tensor: Any) -> torch.Tensor:
    """What of a tensor is on this rank: a shard, or all of it."""
    if hasattr(tensor, "ds_tensor"):  # ZeRO-3
        shard: torch.Tensor = tensor.ds_tensor
        return shard
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """The tensors of an optimizer's `state`, however nested."""
    if isinstance(state, torch.Tensor):
        yield here(state)
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from tensors_of(value)


def _is_torchs(kind: type | str) -> bool:
    return not isinstance(kind, str) and kind.__module__.startswith("torch.optim")


def _after_a_step(kind: Any, groups: list[Group]) -> int:
    made = []
    for options, params in groups:
        like = [torch.empty_like(here(p), device="meta").requires_grad_() for p in params]
        for p in like:
            p.grad = torch.empty_like(p)
        if like:
            # As on the CPU: fused and foreach steps have the same state, but not on meta.
            plain = {k: v for k, v in options.items() if k not in ("fused", "foreach")}
            made.append({**plain, "params": like})
    if not made:
        return 0
    optimizer = kind(made)
    optimizer.step()
    return sum({id(t): t.nbytes for t in tensors_of(optimizer.state)}.values())


def _adafactor(shape: Shape, options: Mapping[str, Any]) -> int:
    """transformers': in float32, rows and columns of a matrix instead of all of it."""
    numel = math.prod(shape)
    second = numel // shape[-1] + numel // shape[-2] if len(shape) > 1 else numel
    first = numel if options.get("beta1") is not None else 0
    return 4 * (second + first + 1)  # and the root mean square of the parameter


def _lion(shape: Shape, options: Mapping[str, Any]) -> int:
    return 4 * math.prod(shape)


def _adamw_8bit(shape: Shape, options: Mapping[str, Any]) -> int:
    """bitsandbytes': a byte for each number, and a float32 scale for each block."""
    numel = math.prod(shape)
    return 8 * numel if numel < _SMALL else 2 * (numel + 4 * math.ceil(numel / _BLOCK))


_FORMULAS: Mapping[str, Callable[[Shape, Mapping[str, Any]], int]] = {
    "Adafactor": _adafactor,
    "Lion": _lion,
    "AdamW8bit": _adamw_8bit,
    "Adam8bit": _adamw_8bit,
    "PagedAdamW8bit": _adamw_8bit,
    "PagedAdam8bit": _adamw_8bit,
}
