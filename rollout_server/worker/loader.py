"""vLLM's model loader, for a model whose checkpoint is the trainer. Runs in the engine's process.

It is told the names and shapes of the trainer's tensors, fills the model through vLLM's own loader
with random numbers, and has the plan of every later sync recorded on the way. The plan is proven on
those numbers: they are drawn again, and each must be where the plan says. Or it makes the trainer's
memory the model's own (see sharing.py). This happens before vLLM wraps, repacks or captures
anything.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from rollout_server.weights.manifest import read_specs, read_views
from rollout_server.weights.storages import identity
from rollout_server.weights.wire import LOAD_FORMAT, Piece, TensorSpec
from rollout_server.worker import sharing
from rollout_server.worker.plan import Plan
from rollout_server.worker.recording import record


@register_model_loader(LOAD_FORMAT)
class PolicyLoader(DummyModelLoader):
    """`model_loader_extra_config`: {"folder": where `write_specs` wrote to, "share": bool}.

    Leaves on the model `rollout_plan`, a `Plan`, or the text of an error: `rollout_refusal` where
    the model and the trainer's tensors don't fit, `rollout_unshareable` where they can't be one.
    With "share", `rollout_shared` is true and the parameters are the trainer's memory.
    """

    def __init__(self, load_config: Any):
        BaseModelLoader.__init__(self, load_config)  # Dummy's own refuses an extra config
        extra = load_config.model_loader_extra_config
        self._folder, self._share = extra["folder"], extra["share"]
        self._specs, self._views = read_specs(self._folder), read_views(self._folder)

    def load_weights(self, model: Any, model_config: Any) -> None:
        if self._share:
            self._share_weights(model)
        else:
            self._fill_weights(model)

    def _share_weights(self, model: Any) -> None:
        try:
            plan = self._record(model, _empty(self._specs), write=False)
        except ValueError as error:
            model.rollout_refusal = str(error)
            return
        try:
            wanted = sharing.layout(model, plan)
        except ValueError as error:
            model.rollout_unshareable = str(error)
            return
        sharing.bind(model, self._folder, wanted)
        # Once more, for the memory that the parameters have now.
        model.rollout_plan = self._record(model, _empty(self._specs), write=False)
        model.rollout_shared = True

    def _fill_weights(self, model: Any) -> None:
        device = next(model.parameters()).device
        try:
            plan = self._record(model, _random(self._specs, device), write=True)
        except ValueError as error:
            model.rollout_refusal = str(error)
            return
        if plan.usable:
            _disprove(plan, device)
        model.rollout_plan = plan

    def _record(
        self, model: torch.nn.Module, tensors: Iterator[tuple[str, torch.Tensor]], write: bool
    ) -> Plan:
        return record(model, self._specs, tensors, write, self._views)


def _empty(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the trainer's shapes and dtypes, without values."""
    for name, spec in specs.items():
        yield name, torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _random(
    specs: Mapping[str, TensorSpec], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Small random numbers of each tensor's shape and dtype; the same ones each time."""
    generator = torch.Generator(device)
    for name, spec in specs.items():
        tensor = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        if spec.dtype.is_floating_point:
            tensor.uniform_(-1e-3, 1e-3, generator=generator.manual_seed(zlib.crc32(name.encode())))
        yield name, tensor


def _disprove(plan: Plan, device: torch.device) -> None:
    """Note what isn't where the plan says, after `_random` numbers were loaded."""
    for name, tensor in _random(plan.specs, device):
        if plan.mismatched([Piece(name, 0, tensor)]):
            plan.unsupported_reasons.append(f"{name} isn't where the plan says")
            plan.rearranged |= {identity(copy.to) for copy in plan.copies[name]}
