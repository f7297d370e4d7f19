"""A policy partitioned by DeepSpeed ZeRO-3: gathered tensor by tensor, some at a time."""

from collections.abc import Iterator, Mapping

import torch

from rollout_server.weights.sources.base import Source, not_finite
from rollout_server.weights.staging import Staging, streamed
from rollout_server.weights.wire import Parts, TensorSpec

_TOGETHER = 64 << 20  # bytes that are gathered at once


class ZeRO3Source(Source):
    """Parameters with `ds_id`; DeepSpeed gathers them, a few at a time, besides the buckets."""

    collective = True
    staged_from = 0

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors
        self.specs = {
            name: TensorSpec(
                tuple(getattr(t, "ds_shape", t.shape)),
                t.dtype,
                not isinstance(t, torch.nn.Parameter),
            )
            for name, t in self._tensors.items()
        }

    @torch.no_grad()
    def parts(self, staging: Staging) -> Parts:
        device = _shard(next(iter(self._tensors.values()))).device
        yield from streamed(self.specs, self._gathered(), staging, device)

    def not_finite(self) -> list[str]:
        return not_finite((name, _shard(t)) for name, t in self._tensors.items())

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        import deepspeed

        for group in self._groups():
            with deepspeed.zero.GatheredParameters([t for _, t in group if hasattr(t, "ds_id")]):
                for name, tensor in group:
                    yield name, tensor.data

    def _groups(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        group: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in self._tensors.items():
            nbytes = getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
            if group and size + nbytes > _TOGETHER:
                yield group
                group, size = [], 0
            group.append((name, tensor))
            size += nbytes
        if group:
            yield group


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.ds_tensor.data if hasattr(tensor, "ds_tensor") else tensor
