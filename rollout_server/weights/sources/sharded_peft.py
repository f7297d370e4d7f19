"""PEFT policies under FSDP2 or ZeRO-3: the adapter is sharded as the base is.

Merged, one adapted layer at a time is gathered, its adapter too, merged, and given up. With the
adapter alone the base is gathered as it is, and the adapter, which is small, into memory of its own
that stays from one sync to the next.
"""

import contextlib
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor

from rollout_server.weights.sources import fsdp2, zero3
from rollout_server.weights.sources.base import Adapter, whole_pieces
from rollout_server.weights.sources.peft import Merged, WithAdapter
from rollout_server.weights.staging import Staging
from rollout_server.weights.transport import shared_empty
from rollout_server.weights.wire import Part, Parts

Sharded = type[fsdp2.FSDP2Source] | type[zero3.ZeRO3Source]

# An adapter's full tensors, by their names.
_adapters = weakref.WeakKeyDictionary[torch.nn.Module, dict[str, torch.Tensor]]()


class ShardedMerged(Merged):
    """Everything goes through the buckets: first the layers without an adapter."""

    collective = True
    staged_from = 0

    def __init__(self, model: Any, kind: Sharded):
        super().__init__(model)
        self._kind = kind

    @torch.no_grad()
    def parts(self, staging: Staging) -> Parts:
        names, number = list(self._names()), -1
        if self._live:
            with contextlib.closing(self._kind(self._live).parts(staging)) as live:
                for part in live:
                    number = part.number
                    yield part._replace(last=part.last and not names)
        if names:
            device = self._kind(self.tensors).device
            yield from self._merged_parts(names, staging, device, before=number + 1)

    def _whole(self, layer: BaseTunerLayer) -> AbstractContextManager[None]:
        module: Any = layer  # a mixin of modules
        return _whole(module)


class ShardedWithAdapter(WithAdapter):
    """Base and adapter, each gathered."""

    collective = True
    staged_from = 0

    def __init__(self, model: Any, kind: Sharded):
        super().__init__(model)
        self._kind = kind
        own = self.adapter
        self.adapter = ShardedAdapter(own.tensors, own.scaling, weakref.ref(model), kind)

    @property
    def frozen_state(self) -> tuple[Any, ...]:
        # Not where shards are, which can differ from rank to rank: all must send the same parts.
        return tuple(t._version for t in self._frozen.values())

    @torch.no_grad()
    def parts(self, staging: Staging) -> Parts:
        yield from self._kind(self.tensors).parts(staging)

    @torch.no_grad()
    def trained_parts(self, staging: Staging) -> Parts:
        if trained := self._trained():
            yield from self._kind(trained).parts(staging)


@dataclass(frozen=True)
class ShardedAdapter(Adapter):
    """An adapter of which each rank has a shard.

    model: whose it is; the memory that it is gathered into lives as long.
    """

    model: "weakref.ref[torch.nn.Module]"
    kind: Sharded

    @torch.no_grad()
    def part(self) -> Part:
        model = self.model()
        assert model is not None  # it is being synced
        held = _adapters.setdefault(model, {})
        for name, tensor in self.kind(self.tensors).gathered():
            if (memory := held.get(name)) is None or not _alike(memory, tensor):
                memory = held[name] = shared_empty(tensor.shape, tensor.dtype, tensor.device)
            memory.copy_(tensor)
        return Part(-1, True, whole_pieces({name: held[name] for name in self.tensors}))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


@contextlib.contextmanager
def _whole(module: torch.nn.Module) -> Iterator[None]:
    """All parameters of a module and those in it are there in full in the block. Collective."""
    places: list[tuple[dict[str, Any], str, torch.nn.Parameter]] = [
        (owner._parameters, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    if any(hasattr(parameter, "ds_id") for _, _, parameter in places):
        with zero3.whole(parameter for _, _, parameter in places):
            yield
        return
    cut = [place for place in places if isinstance(place[2], DTensor)]
    try:
        for owner, name, parameter in cut:
            owner[name] = torch.nn.Parameter(fsdp2.full(parameter), requires_grad=False)
        yield
    finally:
        for owner, name, parameter in cut:
            owner[name] = parameter
