"""A policy sharded by FSDP2 (`fully_shard`): its rows, gathered bucket by bucket.

The local shards of many parameters travel in one all-gather, straight into memory that the engine
reads. Every rank gets all of it, for its own engine.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from rollout_server.weights.sources.base import Source, Walked, local
from rollout_server.weights.staging import Bucket, Staging, buckets, streamed
from rollout_server.weights.wire import Part, Parts, Piece

# Renamed in torch 2.13, where the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class FSDP2Source(Source):
    """Parameters that are DTensors (see `reshard`); those that aren't cut by rows are gathered one
    by one."""

    collective = True
    staged_from = 0

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__(tensors)
        cut: dict[str, Any] = {n: t for n, t in self.tensors.items() if _row_dim(t) is not None}
        mesh = {(t.device_mesh, _row_dim(t)) for t in cut.values()}
        # A second mesh (experts, for one) goes one by one.
        self._mesh: Any = None
        self._dim: int | None = None
        if mesh:
            self._mesh, self._dim = next(iter(mesh))
        self._rows = {
            n: t for n, t in cut.items() if (t.device_mesh, _row_dim(t)) == (self._mesh, self._dim)
        }
        self._others = {n: t for n, t in self.tensors.items() if n not in self._rows}

    @torch.no_grad()
    def parts(self, staging: Staging) -> Parts:
        planned = self._planned(staging)
        for number, bucket in enumerate(planned):
            last = number == len(planned) - 1 and not self._others
            yield Part(number, last, self._gather(number, bucket, staging))
        if self._others:
            specs = {name: self.specs[name] for name in self._others}
            others = ((name, full(tensor)) for name, tensor in self._others.items())
            yield from streamed(specs, others, staging, self.device, len(planned))

    @property
    def device(self) -> torch.device:
        if self._mesh is None:
            return local(next(iter(self.tensors.values()))).device
        return _device_of(self._mesh)

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full tensor). Collective."""
        for name, tensor in self.tensors.items():
            yield name, full(tensor)

    def _planned(self, staging: Staging) -> list[Bucket]:
        """Buckets of one rank's rows; the same on all ranks, so by the largest shard of each."""
        if not self._rows:
            return []
        world = self._mesh.size(self._dim)
        rows = [
            (name, staging.engine.dtype(name, t.dtype), tuple(t.shape[1:]), -(-t.shape[0] // world))
            for name, t in self._rows.items()
        ]
        # Two buckets of all ranks' rows, and once more this rank's own, are the memory taken.
        limit = 2 * staging.bucket_bytes // (2 * world + 1)
        # With several ranks each has a piece already.
        splittable = staging.engine.splittable
        if stuck := self._rows.keys() - splittable:
            self._others |= {name: self._rows.pop(name) for name in stuck}
            rows = [row for row in rows if row[0] in self._rows]
        return buckets(rows, limit, splittable)

    def _gather(self, number: int, bucket: Bucket, staging: Staging) -> list[Piece]:
        group, world = self._mesh.get_group(self._dim), self._mesh.size(self._dim)
        mine = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self.device)
        for slot in bucket.slots:
            shard = self._rows[slot.name].to_local()[slot.first : slot.first + slot.rows]
            slot.of(mine, shard.shape[0]).copy_(shard)  # casts; crosses devices (CPU offload)
        memory = staging.memory(number, world * bucket.nbytes, self.device)
        _all_gather(memory, mine, group=group)
        pieces = []
        for rank, received in enumerate(memory.view(world, bucket.nbytes)):
            for slot in bucket.slots:
                total = self.specs[slot.name].shape[0]
                per_rank = -(-total // world)  # torch.chunk's rule
                start = rank * per_rank + slot.first
                rows = min(slot.rows, total - start)
                if rows > 0:
                    pieces.append(Piece(slot.name, start, slot.of(received, rows)))
        return pieces


def reshard(walked: Walked) -> None:
    """Have modules give up full parameters that a forward pass may have left. Local."""
    for _, module in walked:
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor. Collective where it is sharded."""
    whole: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole


def _row_dim(tensor: Any) -> int | None:
    """The one mesh dimension over which a DTensor is cut, by rows; None: not cut like that."""
    if not isinstance(tensor.data, DTensor) or not tensor.shape:
        return None
    cut = [i for i, place in enumerate(tensor.placements) if not place.is_replicate()]
    # The exact type: _StridedShard (FSDP over tensor parallel) is another layout.
    if len(cut) == 1 and type(tensor.placements[cut[0]]) is Shard:
        return cut[0] if tensor.placements[cut[0]].dim == 0 else None
    return None


def _device_of(mesh: Any) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
