"""Tensors that aren't there in full are put together in two buckets: one is filled while the engine
reads the other.

What goes where follows from names and shapes alone, so every rank, and every sync, has the same
buckets; their memory and its handles stay the same too.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from rollout_server.weights.transport import shared_empty
from rollout_server.weights.wire import Part, Parts, Piece, TensorSpec

_ALIGN = 16


@dataclass(frozen=True)
class BucketSlot:
    """Rows `first` to `first + rows` of a tensor, at `offset` bytes of a bucket."""

    name: str
    dtype: torch.dtype
    row_shape: tuple[int, ...]
    first: int
    rows: int
    offset: int

    @property
    def row_bytes(self) -> int:
        return _row_bytes(self.row_shape, self.dtype)

    def of(self, memory: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """The rows (or the first of them) as a view of a bucket's bytes; (rows, *row_shape)."""
        rows = self.rows if rows is None else rows
        flat = memory[self.offset : self.offset + rows * self.row_bytes]
        return flat.view(self.dtype).view(rows, *self.row_shape)


@dataclass
class Bucket:
    """Slots, and how many bytes they take."""

    slots: list[BucketSlot] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class EngineTensorInfo:
    """What the engine says of the tensors.

    dtypes: what it holds them in; tensors travel in that dtype where it is the smaller one.
    splittable: names of those that may come in pieces.
    """

    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    splittable: set[str] = field(default_factory=set)

    def dtype(self, name: str, own: torch.dtype) -> torch.dtype:
        to = self.dtypes.get(name, own)
        return to if own.is_floating_point and to.itemsize < own.itemsize else own


class Staging:
    """The memory of two buckets, for one sync after another.

    bucket_bytes: `2 * bucket_bytes` is all that a sync takes besides the largest single tensor
    that can't be split.
    """

    def __init__(self, bucket_bytes: int, engine: EngineTensorInfo):
        self.bucket_bytes = bucket_bytes
        self.engine = engine
        self._memory: list[torch.Tensor | None] = [None, None]

    def memory(self, number: int, nbytes: int, device: torch.device) -> torch.Tensor:
        """`nbytes` bytes for the bucket `number`; those of the bucket before last."""
        at = number % 2
        held = self._memory[at]
        if held is None or held.numel() < nbytes or held.device != device:
            self._memory[at] = held = None  # first free it
            self._memory[at] = held = shared_empty((nbytes,), torch.uint8, device)
        return held[:nbytes]

    def release(self) -> None:
        """Give the memory back; the next sync takes it anew."""
        self._memory = [None, None]


def buckets(
    rows: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]], limit: int, splittable: set[str]
) -> list[Bucket]:
    """Fill buckets of `limit` bytes in order; only what can't be split makes a larger one.

    rows: (name, dtype, shape of a row, number of rows) of each tensor.
    """
    found = [Bucket()]
    for name, dtype, row_shape, count in rows:
        row = max(_row_bytes(row_shape, dtype), 1)
        first = 0
        while first < count:
            bucket = found[-1]
            room = max(0, limit - bucket.nbytes) // row
            take = min(count - first, room)
            if name not in splittable and take < count:
                take = count if not bucket.slots else 0
            elif take == 0 and not bucket.slots:
                take = 1  # a row that is larger than a bucket
            if take == 0:
                found.append(Bucket())
                continue
            bucket.slots.append(BucketSlot(name, dtype, row_shape, first, take, bucket.nbytes))
            bucket.nbytes += -(-take * row // _ALIGN) * _ALIGN
            first += take
    return [bucket for bucket in found if bucket.slots]


def streamed(
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[tuple[str, torch.Tensor]],
    staging: Staging,
    device: torch.device,
    before: int = 0,
    more: bool = False,
) -> Parts:
    """Parts with the tensors of an iterator, which is asked for one after another.

    specs: of the tensors in the iterator's order; before: number of parts that came before;
    more: whether other parts follow.
    """
    rows = [
        (name, staging.engine.dtype(name, s.dtype), s.shape[1:], s.shape[0] if s.shape else 1)
        for name, s in specs.items()
    ]
    name, tensor = "", torch.empty(0)
    planned = buckets(rows, staging.bucket_bytes, staging.engine.splittable)
    for index, bucket in enumerate(planned):
        number = before + index
        memory = staging.memory(number, bucket.nbytes, device)
        pieces = []
        for slot in bucket.slots:
            if slot.name != name:
                name, tensor = next(tensors)
                if slot.name != name:
                    raise RuntimeError(f"{name} came where {slot.name} was expected")
            view = slot.of(memory)
            view.copy_(tensor.reshape(-1, *slot.row_shape)[slot.first : slot.first + slot.rows])
            shape = specs[name].shape
            pieces.append(Piece(name, slot.first, view if shape else view.view(())))
        yield Part(number, index == len(planned) - 1 and not more, pieces)


def _row_bytes(row_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    itemsize: int = dtype.itemsize
    return math.prod(row_shape) * itemsize
