"""PEFT policies: merged into whole weights for the engine, or the adapter's tensors alone.

Merged, each adapted layer is merged in place for as long as its weights are copied, and put back
bit by bit: subtracting what was added would leave rounding errors, more at each sync.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from rollout_server.errors import NotAvailableError, UnsupportedModelError
from rollout_server.weights.sources.base import (
    Adapter,
    Source,
    full_shape,
    not_finite,
    own_tensors,
    plain_name,
    whole_pieces,
)
from rollout_server.weights.staging import Staging, streamed
from rollout_server.weights.wire import Part, Parts

_PREFIX = "base_model.model."


class Merged(Source):
    """Adapted layers go through the buckets; the others, which nothing is merged into, as they are.

    With `modules_to_save`, the trained copy goes in place of the original.
    """

    staged_from = 1

    def __init__(self, model: Any):
        self._model = model
        self._layers = {
            _layer_name(path, model): layer
            for path, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer) and _adapted(layer)
        }
        adapted = {
            id(p)
            for layer in self._layers.values()
            for p in layer.get_base_layer().parameters(recurse=False)
        }
        tensors = base_tensors(model)
        _refuse_tied(model, tensors, adapted)
        super().__init__(tensors)
        self._live = {n: t for n, t in tensors.items() if id(t) not in adapted}

    @torch.no_grad()
    def parts(self, staging: Staging) -> Parts:
        names = list(self._names())
        yield Part(0, not names, whole_pieces(self._live))
        if not names:  # the adapter is disabled, or merged by its owner
            return
        yield from self._merged_parts(names, staging, self.tensors[names[0]].device, before=1)

    def _merged_parts(
        self, names: list[str], staging: Staging, device: torch.device, before: int
    ) -> Parts:
        with contextlib.closing(self._merged()) as merged:
            specs = {name: self.specs[name] for name in names}
            yield from streamed(specs, merged, staging, device, before)

    def not_finite(self) -> list[str]:
        return not_finite((plain_name(n), p) for n, p in self._model.named_parameters())

    def _names(self) -> Iterator[str]:
        """Names of the adapted layers' weights, in the order of `_merged`."""
        for path, layer in self._layers.items():
            for name, _ in layer.get_base_layer().named_parameters(recurse=False):
                yield f"{path}.{name}"

    def _merged(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        for path, layer in self._layers.items():
            with self._whole(layer), _while_merged(layer) as weights:
                for name, tensor in weights.items():
                    yield f"{path}.{name}", tensor

    def _whole(self, layer: BaseTunerLayer) -> AbstractContextManager[None]:
        """Around what needs a layer's parameters in full."""
        return contextlib.nullcontext()


class WithAdapter(Source):
    """The base in two parts, frozen and trained (`modules_to_save`); the adapter besides them."""

    def __init__(self, model: Any):
        tensors = base_tensors(model)
        super().__init__(tensors)
        self.adapter: Adapter = adapter_of(model)
        self._frozen = {n: t for n, t in tensors.items() if not t.requires_grad}

    @property
    def frozen_state(self) -> tuple[Any, ...]:
        return tuple((t.data_ptr(), t._version) for t in self._frozen.values())

    def parts(self, staging: Staging) -> Parts:
        trained = self._trained()
        yield Part(0, not trained, whole_pieces(self._frozen))
        yield from self.trained_parts(staging)

    def trained_parts(self, staging: Staging) -> Parts:
        if trained := self._trained():
            yield Part(1, True, whole_pieces(trained))

    def _trained(self) -> dict[str, torch.Tensor]:
        return {n: t for n, t in self.tensors.items() if n not in self._frozen}

    def not_finite(self) -> list[str]:
        return super().not_finite() + not_finite(self.adapter.tensors.items())


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The base's parameters and persistent buffers by a checkpoint's names; tied ones once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, tensor in own_tensors(module):
            if id(tensor) in seen:
                continue
            name = base_name(f"{path}.{key}", model)
            if name is not None:
                seen.add(id(tensor))
                tensors[name] = tensor
    return tensors


def _layer_name(path: str, model: Any) -> str:
    name = base_name(f"{path}.weight", model)
    if name is None:
        raise UnsupportedModelError(f"{path} has an adapter, but its weights are in no checkpoint")
    return name.removesuffix(".weight")


def base_name(name: str, model: Any) -> str | None:
    """The checkpoint's name of a PEFT model's tensor; None if it is in no checkpoint."""
    name = plain_name(name).removeprefix(_PREFIX)
    head, saved, tail = name.partition(".modules_to_save.")
    if saved:  # the base's own parameters, trained
        adapter, _, rest = tail.partition(".")
        return f"{head}.{rest}" if adapter in model.active_adapters else None
    if ".original_module." in name or "lora_" in name:
        return None
    adapters = model.peft_config.keys()
    if any(f".{adapter}." in f"{name}." for adapter in adapters):  # of other tuners
        return None
    return name.replace(".base_layer.", ".")


def adapter_of(model: Any) -> Adapter:
    """The active LoRA adapter; `NotAvailableError` for what vLLM's LoRA layers can't compute."""
    active = model.active_adapters
    if len(active) != 1:
        raise NotAvailableError(
            f"the policy has {len(active)} active adapters, peft='adapter' takes one; use "
            "peft='merge'"
        )
    tensors: dict[str, torch.Tensor] = {}
    scaling: dict[str, float] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not _has(module, active[0]):
            continue
        layer: Any = module  # it has what its tuner gives it
        if why := _not_plain(layer, active[0]):
            raise NotAvailableError(
                f"{name} has {why}, which vLLM's LoRA layers don't compute; use peft='merge'"
            )
        if active[0] in layer.lora_A:
            a, b = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
            names = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        else:
            a, b = layer.lora_embedding_A[active[0]], layer.lora_embedding_B[active[0]]
            names = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
        name_a, name_b = map(plain_name, names)
        tensors |= {name_a: a, name_b: b}
        scaling[name_b] = float(layer.scaling[active[0]])
    return Adapter(tensors, scaling)


def _has(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def _adapted(layer: BaseTunerLayer) -> bool:
    """Whether the layer computes something else than its base weights; merged ones don't."""
    if layer.merged or layer.disable_adapters:
        return False
    return any(_has(layer, adapter) for adapter in layer.active_adapters)


def _not_plain(layer: BaseTunerLayer, adapter: str) -> str | None:
    if not isinstance(layer, LoraLayer):
        return f"an adapter of the kind {type(layer).__name__}"
    if variant := getattr(layer, "lora_variant", {}).get(adapter):  # DoRA, aLoRA, ...
        return type(variant).__name__
    if getattr(layer, "lora_bias", {}).get(adapter):
        return "lora_bias"
    if layer.merged:
        return "a merged adapter"
    if type(layer).__name__ == "ParamWrapper":  # LoraConfig.target_parameters
        return "an adapter of a parameter"
    weight: Any = layer.lora_A[adapter].weight if adapter in layer.lora_A else None
    if weight is not None and len(full_shape(weight)) != 2:
        return "an adapter of a convolution"
    return None


@contextlib.contextmanager
def _while_merged(layer: BaseTunerLayer) -> Iterator[dict[str, torch.Tensor]]:
    """Names and values of the layer's merged weights; afterwards it is as it was, to the bit."""
    base = layer.get_base_layer()
    before = {name: (p, p.data, p.data.clone()) for name, p in base.named_parameters(recurse=False)}
    try:
        layer.merge()
        yield {name: p.data for name, p in base.named_parameters(recurse=False)}
    finally:
        try:
            if layer.merged:
                layer.unmerge()
        finally:
            layer.merged_adapters.clear()
            for parameter, memory, values in before.values():
                memory.copy_(values)
                parameter.data = memory


def _refuse_tied(model: Any, tensors: Mapping[str, torch.Tensor], adapted: set[int]) -> None:
    embeddings = model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    weight = getattr(getattr(embeddings, "base_layer", embeddings), "weight", None)
    if tied and id(weight) in adapted and "lm_head.weight" not in tensors:
        raise NotAvailableError(
            "the adapter changes embeddings that are tied to lm_head, whose merged form would "
            "change both; use peft='adapter', or untie them"
        )
