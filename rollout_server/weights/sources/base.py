"""The policy's weights by the names under which vLLM expects them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from rollout_server.errors import UnsupportedModelError, WeightSyncError
from rollout_server.weights.staging import Staging
from rollout_server.weights.wire import Part, Parts, Piece, TensorSpec

# What wrappers inside a model put into a parameter's name: torch.compile, activation checkpointing,
# FSDP1.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: live tensors by PEFT's names, and what each `lora_B` is multiplied with."""

    tensors: Mapping[str, torch.Tensor]
    scaling: Mapping[str, float]

    @property
    def bytes(self) -> int:
        return sum(math.prod(full_shape(t)) * t.element_size() for t in self.tensors.values())

    @property
    def rank(self) -> int:
        return max(full_shape(self.tensors[b])[1] for b in self.scaling)

    def part(self) -> Part:
        """Apart from the base's parts, which are numbered from 0. Collective if it is sharded."""
        return Part(-1, True, whole_pieces(self.tensors))


class Source:
    """The policy's tensors as they are now. This one is for tensors that are there in full.

    Attributes:
        specs: name to shape and dtype of each tensor.
        collective: whether all ranks must walk through `parts` together.
        staged_from: number of the first part that is put together in `Staging`; None: none is.
        adapter: goes besides the parts, which are its base then.
        frozen_state: differs where tensors that aren't trained have changed; None: all are trained.
    """

    collective = False
    adapter: Adapter | None = None
    staged_from: int | None = None

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        specs: Mapping[str, TensorSpec] | None = None,
    ):
        """specs: of the tensors, if they are known."""
        self._tensors = tensors
        self.specs = specs or {
            name: TensorSpec(full_shape(t), t.dtype, not isinstance(t, torch.nn.Parameter))
            for name, t in tensors.items()
        }

    @property
    def frozen_state(self) -> tuple[Any, ...] | None:
        return None

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The live tensors by name."""
        return self._tensors

    def only(self, names: Iterable[str]) -> "Source":
        """The source of some of the tensors."""
        return Source({name: self._tensors[name] for name in names})

    def parts(self, staging: Staging) -> Parts:
        """All tensors, part by part; a part may be overwritten when the next but one is asked for.

        These are the live tensors: one part, and nothing is copied. `staging` is for those that
        have to be put together.
        """
        pieces = whole_pieces(self._tensors)
        if pieces:
            yield Part(0, True, pieces)

    def trained_parts(self, staging: Staging) -> Parts:
        """The parts without what is frozen."""
        return self.parts(staging)

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an infinity, in what this rank has of them."""
        return not_finite(self._tensors.items())


def require_same(
    then: Mapping[str, TensorSpec], now: Mapping[str, TensorSpec], dtypes: bool
) -> None:
    """`WeightSyncError` unless the policy has the tensors that the engine was started for.

    dtypes: whether these must be the same too; a copy casts, and mixed precision changes them.
    """
    if then is now:
        return
    lines = [f"{name} is gone" for name in then.keys() - now.keys()]
    lines += [f"{name} {now[name].shape} is new" for name in now.keys() - then.keys()]
    for name in then.keys() & now.keys():
        old, new = then[name], now[name]
        if old.shape != new.shape:
            lines.append(f"{name} had shape {old.shape}, has {new.shape}")
        elif dtypes and old.dtype != new.dtype:
            lines.append(f"{name} had {old.dtype}, has {new.dtype}")
    if lines:
        raise WeightSyncError(
            "the policy's tensors aren't those that the engine was started for; nothing was "
            "written. close() the server and attach() again. " + "; ".join(sorted(lines))
        )


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; reads each once, allocates nothing. Of
    those that are sharded, this rank's shards."""
    names, extremes = [], []
    for name, tensor in ((name, local(tensor)) for name, tensor in tensors):
        if tensor.is_floating_point() and tensor.numel():
            names.append(name)
            extremes += [bound.float() for bound in torch.aminmax(tensor.detach())]
    if not names:
        return []
    finite = torch.stack(extremes).isfinite().view(-1, 2).all(1).tolist()  # one synchronisation
    return [name for name, good in zip(names, finite, strict=True) if not good]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor: its shard under FSDP2 or ZeRO-3, else all of it."""
    held: torch.Tensor
    if isinstance(tensor.data, DTensor):
        held = cast(DTensor, tensor).to_local()
    elif hasattr(tensor, "ds_tensor"):
        held = tensor.ds_tensor.data
    else:
        held = tensor
    return held


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor that may be sharded, of which ZeRO-3 leaves an empty one."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def bare_model(model: Any) -> torch.nn.Module:
    """The module inside DDP, torch.compile and DeepSpeed's engine."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine"):
            inner = model.module
        if inner is None:
            return cast(torch.nn.Module, model)
        model = inner


def architecture(model: Any) -> torch.nn.Module:
    """The module with the config, inside all wrappers: FSDP1's and PEFT's too."""
    bare: Any = bare_model(model)
    if type(bare).__name__ == "FullyShardedDataParallel":
        return architecture(bare.module)
    if hasattr(bare, "peft_config") and hasattr(bare, "get_base_model"):
        return architecture(bare.get_base_model())
    return cast(torch.nn.Module, bare)


Walked = Sequence[tuple[str, torch.nn.Module]]  # modules by their paths, each once


def modules_of(model: torch.nn.Module) -> Walked:
    """What `named_modules` gives, in a tenth of its time: it is a generator in a generator for each
    level, and this runs at every sync."""
    seen: set[int] = set()
    found = []
    waiting = [("", model)]
    while waiting:
        path, module = walked = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append(walked)
        if children := module._modules:
            before = f"{path}." if path else ""
            waiting += [(before + n, c) for n, c in reversed(children.items()) if c is not None]
    return found


def parameters_in(walked: Walked) -> list[torch.nn.Parameter]:
    """The modules' parameters, one that is tied as often as it is there."""
    return [p for _, module in walked for p in module._parameters.values() if p is not None]


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters and persistent buffers, not those of its children."""
    if not (module._parameters or module._buffers):
        return
    derived = module._non_persistent_buffers_set
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in derived:
            yield name, tensor


def whole_pieces(tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
    """Tensors that are there in full, as pieces."""
    return [Piece(name, 0, tensor.detach()) for name, tensor in tensors.items()]


def policy_tensors(model: Any, walked: Walked | None = None) -> dict[str, torch.Tensor]:
    """Name to tensor, of every parameter and persistent buffer, as a checkpoint names them.

    Tied tensors come once, under their first name, where the config says that they are tied.
    The tensors are the live ones: nothing is copied. walked: the bare model's modules, if they are
    known.
    """
    model = bare_model(model)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, module in walked or modules_of(model):
        for name, tensor in own_tensors(module):
            if tied and id(tensor) in seen:
                continue
            seen.add(id(tensor))
            tensors[plain_name(f"{path}.{name}" if path else name)] = tensor
    if not tensors:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters to serve")
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device, without values; load the weights before attach()"
            )
    return tensors


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    if name[0] == "_" or "._" in name:
        for part in _WRAPPERS:
            name = name.replace(part, "")
    return name
