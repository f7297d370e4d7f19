"""A policy partitioned by DeepSpeed ZeRO-3: gathered tensor by tensor, some at a time."""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch

from rollout_server.weights.sources.base import Source, full_shape, local
from rollout_server.weights.staging import Staging, streamed
from rollout_server.weights.wire import Parts

_TOGETHER = 64 << 20  # bytes that are gathered at once


class ZeRO3Source(Source):
    """Parameters with `ds_id`; DeepSpeed gathers them, a few at a time, besides the buckets."""

    collective = True
    staged_from = 0

    @torch.no_grad()
    def parts(self, staging: Staging) -> Parts:
        yield from streamed(self.specs, self.gathered(), staging, self.device)

    @property
    def device(self) -> torch.device:
        return local(next(iter(self._tensors.values()))).device

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full tensor); it holds until the next is asked for. Collective."""
        for group in self._groups():
            with whole(dict(group).values()):
                for name, tensor in group:
                    yield name, tensor.data

    def _groups(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        group: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in self._tensors.items():
            nbytes = math.prod(full_shape(tensor)) * tensor.element_size()
            if group and size + nbytes > _TOGETHER:
                yield group
                group, size = [], 0
            group.append((name, tensor))
            size += nbytes
        if group:
            yield group


@contextlib.contextmanager
def whole(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Those of the tensors that are partitioned are there in full in the block. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([t for t in tensors if hasattr(t, "ds_id")]):
        yield
