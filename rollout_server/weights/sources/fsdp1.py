"""A policy wrapped by FSDP1 (`FullyShardedDataParallel`): gathered unit by unit."""

import contextlib
import weakref
from collections.abc import Generator, Iterator

import torch
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._runtime_utils import _reshard

from rollout_server.weights.sources.base import Source, not_finite, own_tensors, plain_name
from rollout_server.weights.staging import Staging, streamed
from rollout_server.weights.wire import Parts, TensorSpec

# Shapes aren't known without gathering, and don't change.
_specs = weakref.WeakKeyDictionary[torch.nn.Module, dict[str, TensorSpec]]()


class FSDP1Source(Source):
    """One unit (a decoder layer, as a rule) is gathered at a time, in its master precision, besides
    the buckets. Making the first of these for a model is collective too."""

    collective = True
    staged_from = 0

    def __init__(self, model: torch.nn.Module):
        self._model = model
        if model not in _specs:
            with contextlib.closing(self._walk()) as walk:
                _specs[model] = {
                    name: TensorSpec(tuple(t.shape), t.dtype, not isinstance(t, torch.nn.Parameter))
                    for name, t in walk
                }
        self.specs = _specs[model]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._model.named_parameters())  # the local shards

    @torch.no_grad()
    def parts(self, staging: Staging) -> Parts:
        device = next(self._model.parameters()).device
        with contextlib.closing(self._walk()) as walk:
            yield from streamed(self.specs, walk, staging, device)

    def not_finite(self) -> list[str]:
        return not_finite((plain_name(n), p) for n, p in self._model.named_parameters())

    @torch.no_grad()
    def _walk(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        """(name, full tensor); it holds until the next is asked for. Collective."""
        # In preorder: the root's first summon makes the state of the whole tree.
        for path, unit in self._model.named_modules():
            if isinstance(unit, FSDP):
                _drop_stale(unit)
                with FSDP.summon_full_params(unit, recurse=False, writeback=False):
                    yield from _own(unit.module, f"{path}." if path else "", set())
        yield from _own(self._model, "", set())  # outside of every unit


def _drop_stale(unit: FSDP) -> None:
    """Free full parameters that a forward without backward left: an optimizer step since then has
    changed the shards only, and summon_full_params() would show the old values. Local."""
    handle = unit._handle
    if handle is None or not handle.uses_sharded_strategy:
        return
    has_run = hasattr(handle.flat_param, "_full_param_padded")
    if has_run and not handle.needs_unshard():
        _reshard(unit, handle, True)


def _own(
    module: torch.nn.Module, prefix: str, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is under `module` but not under a unit further down; tied tensors once."""
    if isinstance(module, FSDP):
        return
    for name, tensor in own_tensors(module):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield plain_name(prefix + name), tensor
    for name, child in module.named_children():
        yield from _own(child, f"{prefix}{name}.", seen)
