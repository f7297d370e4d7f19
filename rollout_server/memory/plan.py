"""Whether trainer and engine fit on one GPU, in each phase of a step, and what would make them fit.

Three phases: `rollout`, where the engine is awake and the trainer at rest; `sync`, where it wakes
and the policy's weights are written; `training`, where it sleeps. The KV cache takes what is left,
where its size isn't given.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rollout_server.memory.engine import CONTEXT
from rollout_server.memory.kv_cache import KVCache
from rollout_server.memory.sizes import MIB, shown

_SPARE = 0.02  # of the GPU: what allocators round up, and can't use
# Of what is left, the KV cache's share; beside a trainer that needs it for its own activations,
# half: what these will be isn't known.
_OF_THE_REST, _OF_THE_REST_BESIDE_TRAINING = 0.9, 0.5
_SMALLEST_BUCKET = 64 * MIB
_SHORTEST = 1024  # tokens
_NAMES = ("rollout", "sync", "training")


@dataclass(frozen=True)
class Demand:
    """Who needs what, in bytes of one GPU.

    Args:
        total: the GPU's memory.
        weights: the trainer's; gradients; optimizer: its state; casts: copies in the dtype that it
            computes in; gathered: full layers of sharded ones.
        others: of other processes, the trainer's CUDA context, and its other tensors.
        engine_weights: as the engine computes with them; adapter: its places for LoRA.
        activations, graphs: bounds of the engine's.
        kv_cache: what it keeps; kv_bytes: its size, None: what is left.
        utilization: share of the GPU for the engine, None: no limit.
        longest: tokens of the longest request that must fit; at_most: of requests at a time.
        bucket: of a sync, of which it has two, 0: none is needed.
        colocate, offload: as `colocate` and `offload_optimizer` of `RolloutConfig`.
        shareable: whether colocate="share" is possible.
        movable: whether offload_optimizer is.
    """

    total: int
    weights: int
    gradients: int
    optimizer: int
    casts: int
    gathered: int
    others: int
    engine_weights: int
    adapter: int
    activations: int
    graphs: int
    kv_cache: KVCache = field(repr=False)
    kv_bytes: int | None
    utilization: float | None
    longest: int
    at_most: int
    bucket: int
    colocate: str
    offload: bool
    shareable: bool
    movable: bool


@dataclass(frozen=True)
class Row:
    """What one thing takes in each phase, in bytes."""

    name: str
    rollout: int
    sync: int
    training: int


@dataclass(frozen=True)
class Plan:
    """rows: what there is; kv_bytes: the KV cache's size; most: the largest that would fit (below
    0: how much the rest is over); least: what the longest request needs."""

    demand: Demand
    rows: tuple[Row, ...]
    kv_bytes: int
    most: int
    least: int

    @property
    def left(self) -> dict[str, int]:
        """By phase, in bytes; below 0 where it doesn't fit."""
        return {
            name: self.demand.total - sum(getattr(row, name) for row in self.rows)
            for name in _NAMES
        }

    @property
    def fits(self) -> bool:
        return min(self.left.values()) >= 0 and self.kv_bytes >= self.least

    @property
    def tokens(self) -> int:
        """That the KV cache holds, of the longest requests."""
        return self.demand.kv_cache.tokens_in(self.kv_bytes, self.demand.longest)

    def table(self) -> str:
        """As text, a line for each row."""
        width = max(len(row.name) for row in self.rows) + 2
        lines = [" " * width + "".join(f"{name:>12}" for name in _NAMES)]
        for row in (*self.rows, Row(f"left of {shown(self.demand.total)}", **self.left)):
            cells = (shown(getattr(row, name)) for name in _NAMES)
            lines.append(f"{row.name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)

    def verdict(self) -> str:
        """One sentence: that it fits, or what is missing and which option would make it fit."""
        if self.fits:
            return (
                f"It fits: a KV cache of {shown(self.kv_bytes)} for {self.tokens} tokens (at most "
                f"{shown(self.most)}); training has {shown(self.left['training'])} left for its "
                "activations."
            )
        over = [f"{name} is over by {shown(-left)}" for name, left in self.left.items() if left < 0]
        if self.kv_bytes < self.least:
            longest = self.demand.longest
            over.append(
                f"one request of {longest} tokens needs a KV cache of {shown(self.least)}, and "
                f"{shown(self.kv_bytes)} are there for it"
            )
        option = next(_remedies(self.demand), None)
        would = (
            f"{option} would make it fit."
            if option
            else "No option of attach() would make it fit: shard the trainer over more GPUs "
            "(FSDP), train LoRA, or take an optimizer with less state."
        )
        return f"It doesn't fit: {'; '.join(over)}. {would}"


def plan(demand: Demand) -> Plan:
    """The reckoning."""
    rows = _rows(demand, 0)
    resident = demand.colocate == "resident"
    phases = _NAMES if resident else _NAMES[:2]
    most = demand.total - max(sum(getattr(row, name) for row in rows) for name in phases)
    if demand.utilization is not None:
        own = sum(row.rollout for row in rows if row.name.startswith("engine"))
        if demand.colocate == "share":  # weights included, whosever they are
            own += demand.engine_weights
        most = min(most, int(demand.utilization * demand.total) - own)
    least = demand.kv_cache.request_bytes(demand.longest)
    kv_bytes = demand.kv_bytes
    if kv_bytes is None:
        share = _OF_THE_REST_BESIDE_TRAINING if resident else _OF_THE_REST
        # A share that was asked for is used; more than all requests need isn't.
        wanted = most if demand.utilization is not None else int(most * share)
        kv_bytes = max(0, min(wanted, demand.at_most * least))
        if kv_bytes < least <= most:
            kv_bytes = least
    return Plan(demand, _rows(demand, kv_bytes), kv_bytes, most, least)


def _rows(demand: Demand, kv_bytes: int) -> tuple[Row, ...]:
    d = demand
    asleep = d.colocate != "resident"
    own = d.adapter + (0 if d.colocate == "share" else d.engine_weights)
    parked = 0 if d.offload else d.optimizer
    # A trainer beside a resident engine is at work in every phase.
    gradients, casts, gathered = (0, 0, 0) if asleep else (d.gradients, d.casts, d.gathered)
    buckets = 2 * d.bucket
    spare = int(_SPARE * d.total)

    def steady(name: str, size: int) -> Row:
        return Row(name, size, size, size)

    def of_training(name: str, meanwhile: int, size: int) -> Row:
        return Row(name, meanwhile, meanwhile, size)

    def of_engine(name: str, size: int) -> Row:
        return Row(name, size, size, 0 if asleep else size)

    rows = (
        steady("trainer: weights", d.weights),
        of_training("trainer: gradients", gradients, d.gradients),
        of_training("trainer: optimizer state", parked, d.optimizer),
        of_training("trainer: casts", casts, d.casts),
        of_training("trainer: gathered layers", gathered, d.gathered),
        steady("trainer: context, others", d.others),
        of_engine("engine: weights", own),
        of_engine("engine: KV cache", kv_bytes),
        of_engine("engine: activations", d.activations),
        steady("engine: CUDA graphs", d.graphs),
        steady("engine: context", CONTEXT),
        Row("sync: two buckets", 0, buckets, 0 if asleep else buckets),
        steady("spare", spare),
    )
    return tuple(row for row in rows if row.rollout or row.sync or row.training)


def _remedies(demand: Demand) -> Iterator[str]:
    """Options, as they are written, with which it fits by the same reckoning; one alone first."""
    options = _options(demand)
    fixed = demand.kv_bytes is not None or demand.utilization is not None
    for number in range(len(options) + 1):
        for chosen in itertools.combinations(options, number):
            fields = {name: value for changes, _ in chosen for name, value in changes.items()}
            texts = [text for _, text in chosen]
            changed = dataclasses.replace(demand, **fields)
            clash = len(fields) < number or (changed.offload and changed.colocate == "resident")
            if clash:
                continue
            if plan(changed).fits:
                yield " with ".join(texts)
            if fixed:
                found = plan(dataclasses.replace(changed, kv_bytes=None, utilization=None))
                if found.fits:
                    size = max(found.least, found.most // MIB * MIB)
                    yield " with ".join([f"kv_cache_memory_bytes={size}", *texts])


def _options(demand: Demand) -> list[tuple[dict[str, Any], str]]:
    """Fields of another demand, and how they are written as an option; the mildest first."""
    found: list[tuple[dict[str, Any], str]] = []
    if demand.colocate == "resident":
        found.append(({"colocate": "sleep"}, 'colocate="sleep"'))
    if demand.movable and not demand.offload and demand.optimizer:
        found.append(({"offload": True}, "offload_optimizer=True"))
    if demand.shareable and demand.colocate != "share":
        found.append(({"colocate": "share"}, 'colocate="share"'))
    if demand.bucket > _SMALLEST_BUCKET:
        bucket = {"bucket": _SMALLEST_BUCKET}
        found.append((bucket, f"sync_bucket_bytes={_SMALLEST_BUCKET}"))
    if demand.graphs:
        found.append(({"graphs": 0}, 'engine_args={"enforce_eager": True}'))
    if demand.longest > _SHORTEST:
        shorter = max(_SHORTEST, demand.longest // 4)
        found.append(({"longest": shorter}, f"max_model_len={shorter}"))
    return found
