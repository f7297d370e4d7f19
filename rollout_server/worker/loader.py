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
from rollout_server.weights.wire import LOAD_FORMAT, Layout, Piece, TensorSpec
from rollout_server.worker import sharing
from rollout_server.worker.pages import move_to_pages
from rollout_server.worker.plan import Plan
from rollout_server.worker.recording import record
from rollout_server.worker.unallocated import Unallocated, allocate, built


@register_model_loader(LOAD_FORMAT)
class PolicyLoader(DummyModelLoader):
    """`model_loader_extra_config`: {"folder": where `write_specs` wrote to, "share": bool}.

    Leaves on the model `rollout_plan`, a `Plan`, or the text of an error: `rollout_refusal` where
    the model and the trainer's tensors don't fit, `rollout_unshareable` where they can't be one.
    With "share", `rollout_shared` is true and the parameters are the trainer's memory; they had
    none before, where the architecture allows it (see unallocated.py).
    """

    _unallocated: Unallocated | None = None  # while a model is built

    def __init__(self, load_config: Any):
        BaseModelLoader.__init__(self, load_config)  # Dummy's own refuses an extra config
        extra = load_config.model_loader_extra_config
        self._folder, self._share = extra["folder"], extra["share"]
        self._specs, self._views = read_specs(self._folder), read_views(self._folder)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        def build() -> Any:
            return super(PolicyLoader, self).load_model(vllm_config, model_config, prefix)

        if not self._share:
            return build()
        self._device = torch.device(self.load_config.device or vllm_config.device_config.device)
        self._unallocated = Unallocated()
        name = " ".join(model_config.architectures)
        return built(build, self._unallocated, vllm_config.compilation_config, name)

    def load_weights(self, model: Any, model_config: Any) -> None:
        if self._unallocated is not None:
            self._unallocated.end()
        if self._share:
            self._share_weights(model)
        else:
            self._fill_weights(model)

    def _share_weights(self, model: Any) -> None:
        wanted = self._layout(model)
        if wanted is None:  # vLLM goes on all the same, until the reason is asked for
            allocate(model, self._device)
            return
        sharing.bind(model, self._folder, wanted, self._device)
        # Once more, for the memory that the parameters have now.
        model.rollout_plan = self._record(model, _empty(self._specs), write=False)
        model.rollout_shared = True

    def _layout(self, model: Any) -> Layout | None:
        """Where the trainer's tensors are to be; None, and noted on the model, if they can't."""
        try:
            plan = self._record(model, _empty(self._specs), write=False)
        except ValueError as error:
            model.rollout_refusal = str(error)
            return None
        try:
            return sharing.layout(model, plan)
        except ValueError as error:
            model.rollout_unshareable = str(error)
            return None

    def _fill_weights(self, model: Any) -> None:
        device = next(model.parameters()).device
        if device.type == "cpu":
            move_to_pages(model)
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
