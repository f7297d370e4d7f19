"""A LoRA adapter in vLLM's buffers, from live tensors: no files. Runs in the engine's process.

vLLM itself finds the places: it is given tensors without values, and its copies into the buffers
are noted instead of made. So packed, sharded, transposed and padded layers need nothing here. vLLM
takes the adapter for loaded, and never opens a request's `lora_path`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rollout_server import vllm_compat as compat
from rollout_server.weights.storages import Watching, identity
from rollout_server.weights.wire import ADAPTER_ID, Piece


class AdapterSlot:
    """Where the tensors of the policy's adapter land.

    Making one registers the adapter with vLLM's LoRA manager, in place of one that is there, and
    zeroes its buffers. vLLM up to 0.32 loses them in a sleep: make a new one after that.
    """

    def __init__(self, model: Any, pieces: Sequence[Piece], scaling: Mapping[str, float]):
        """model: the worker's `get_model()`; scaling: what each `lora_B` is multiplied with."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights
        from vllm.lora.utils import parse_fine_tuned_lora_name

        manager = model.lora_manager
        mapper = compat.lora_name_mapper(model)
        layers: dict[str, list[Any]] = {}
        recorder = _CopyRecorder()
        for name, _, tensor in pieces:
            module, is_a = parse_fine_tuned_lora_name(name, mapper)
            stand_in = recorder.stand_in(name, tensor)
            layers.setdefault(module, [None, None])[0 if is_a else 1] = stand_in
        # Scaling 1: vLLM would multiply a B in place, and it is the trainer's.
        loras = {
            module: LoRALayerWeights(module, a.shape[0], a.shape[0], a, b, scaling=1)
            for module, (a, b) in layers.items()
        }
        manager.remove_adapter(ADAPTER_ID)
        manager._last_mapping = None  # what was derived from it may be lost since a sleep
        rank = max(lora.rank for lora in loras.values())
        try:
            with torch.no_grad(), recorder:
                manager.add_adapter(LoRAModel(ADAPTER_ID, rank, loras))
                manager.activate_adapter(ADAPTER_ID)
            taken = {name for name, *_ in recorder.places}
            if ignored := [p.name for p in pieces if p.name not in taken]:
                raise ValueError(
                    f"vLLM has no LoRA layer for {ignored}; use peft='merge' for this policy"
                )
        except Exception:
            manager.remove_adapter(ADAPTER_ID)
            raise
        self._places = recorder.places
        self.scaling = dict(scaling)

    def write(self, pieces: Sequence[Piece]) -> None:
        """Copy all of the adapter's tensors to their places, B times scaling."""
        torch._foreach_copy_(*self._pairs(pieces))

    def mismatched(self, pieces: Sequence[Piece]) -> list[str]:
        """Names of tensors whose places hold something else."""
        names = [name for name, *_ in self._places]
        triples = zip(names, *self._pairs(pieces), strict=True)
        differ = [n for n, place, value in triples if not torch.equal(place, value.to(place.dtype))]
        return list(dict.fromkeys(differ))

    def _pairs(self, pieces: Sequence[Piece]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        tensors = {p.name: p.tensor for p in pieces}
        places, values, factors = [], [], []
        for name, place, (size, stride, offset) in self._places:
            tensor = tensors[name]
            values.append(tensor.as_strided(size, stride, tensor.storage_offset() + offset))
            places.append(place)
            factors.append(self.scaling.get(name, 1.0))
        if scaled := [i for i, factor in enumerate(factors) if factor != 1]:
            # Before the cast to the engine's dtype: one rounding, not two.
            products = torch._foreach_mul([values[i] for i in scaled], [factors[i] for i in scaled])
            for i, product in zip(scaled, products, strict=True):
                values[i] = product
        return places, values


class _CopyRecorder(Watching):
    """Notes copies from stand-ins instead of making them: (name, where to, which part of it)."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[str, torch.Tensor, tuple[Any, ...]]] = []
        self._names: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []

    def stand_in(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        stand_in = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
        self._kept.append(stand_in)  # so that no other storage gets its identity
        self._names[identity(stand_in)] = name
        return stand_in

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            place, source = args[:2]
            name = self._names.get(identity(source))
            if name is None:
                raise ValueError(
                    f"vLLM rearranges the adapter for a buffer of shape {tuple(place.shape)}; use "
                    "peft='merge' for this policy"
                )
            part = (source.size(), source.stride(), source.storage_offset())
            self.places.append((name, place, part))
            return place
        return func(*args, **(kwargs or {}))


def add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: Sequence[torch.Tensor],
    lora_b_stacked: Sequence[torch.Tensor],
    scale: float,
    output_slices: Sequence[int],
    *,
    buffer: Any = None,
    **kwargs: Any,
) -> None:
    """In place of `PunicaWrapperCPU.add_lora_linear`: here every request has the one adapter.

    vLLM's own copies A and B once for every token, several times the layer's own work.
    """
    if self.no_lora:  # warm-up
        return
    linear = torch.nn.functional.linear
    rows, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    at = 0
    for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        rows[:, at : at + width] += linear(linear(x, a[0, 0]), b[0, 0])
        at += width
