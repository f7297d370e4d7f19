"""Where each of the trainer's tensors lands in the engine, so that a sync is copies alone.

A plan is what `recording.record` saw vLLM's loader do: a `Copy` from a view of one of the trainer's
tensors to a view of a parameter for each write, or a `Fill`. Whatever isn't such a write is an
obstacle, and a plan with an obstacle isn't used.

The loader goes by a checkpoint's names and layout; where the trainer's differ (experts that are one
tensor in memory and many in a checkpoint), each of a checkpoint's tensors is a `View` of one of the
trainer's. The plan goes by the trainer's. Its tensors are contiguous when they arrive, and may come
in pieces: some rows (of dimension 0) of the whole.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout_server.weights.storages import identity
from rollout_server.weights.wire import Piece, TensorSpec, Views


@dataclass(frozen=True)
class Copy:
    """A view of the contiguous source `name`, in elements, and where it goes."""

    name: str
    offset: int
    stride: tuple[int, ...]
    to: torch.Tensor


@dataclass(frozen=True)
class Fill:
    """Elements that the loader sets itself, such as the padding of a vocabulary."""

    to: torch.Tensor
    value: float


@dataclass
class Plan:
    """What `record` saw; specs and copies by the trainer's names."""

    specs: Mapping[str, TensorSpec]
    views: Views = field(default_factory=dict)
    copies: dict[str, list[Copy]] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)
    unsupported_reasons: list[str] = field(default_factory=list)
    repacked: list[str] = field(default_factory=list)  # of these, what vLLM did after loading
    rearranged: set[int] = field(default_factory=set)  # `identity` of what holds other values

    @property
    def usable(self) -> bool:
        return not self.unsupported_reasons

    def pairs(self, pieces: Iterable[Piece]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(destinations, sources), equally long and pairwise of one shape."""
        to, sources = [], []
        for piece in pieces:
            for copy in self.copies.get(piece.name, ()):
                pair = _part(copy, self.specs[piece.name].shape, piece)
                if pair is not None:
                    to.append(pair[0])
                    sources.append(pair[1])
        return to, sources

    def splittable(self) -> set[str]:
        """Names of the tensors that may come in pieces."""
        return {
            name
            for name, copies in self.copies.items()
            if all(_by_rows(c, _row_size(self.specs[name].shape)) for c in copies)
        }

    def dtypes(self) -> dict[str, str]:
        """Name to torch's name of the dtype that the engine holds it in, where that is one."""
        return {
            name: str(copies[0].to.dtype).removeprefix("torch.")
            for name, copies in self.copies.items()
            if len({c.to.dtype for c in copies}) == 1
        }

    def fill(self) -> None:
        for fill in self.fills:
            fill.to.fill_(fill.value)

    def mismatched(self, pieces: Sequence[Piece]) -> list[str]:
        """Names of the pieces that differ from what the engine holds."""
        names: dict[str, None] = {}
        for piece in pieces:
            for to, source in zip(*self.pairs([piece]), strict=True):
                if not torch.equal(to, source.to(to.dtype)):
                    names[piece.name] = None
        return list(names)

    def comparable(self, pieces: Sequence[Piece], model: torch.nn.Module) -> list[Piece]:
        """Those of the pieces that the model holds as they are, in memory that it had when the plan
        was made, and that nothing has `rearranged`."""
        held = {identity(t) for t in [*model.parameters(), *model.buffers()]} - self.rearranged
        return [
            piece
            for piece in pieces
            if (copies := self.copies.get(piece.name))
            and all(identity(c.to) in held for c in copies)
        ]

    def stale(self, model: torch.nn.Module) -> list[str]:
        """Parameters of the model that have other memory than when the plan was made."""
        written = {identity(c.to) for copies in self.copies.values() for c in copies}
        return [n for n, p in model.named_parameters() if identity(p) not in written]


def checkpoint_tensors(
    views: Views, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The trainer's contiguous tensors, as a checkpoint has them."""
    for name, tensor in tensors:
        if name not in views:
            yield name, tensor
            continue
        base = tensor.storage_offset()
        for view in views[name]:
            yield view.name, tensor.as_strided(view.shape, view.stride, base + view.offset)


def merged(copies: list[Copy], spec: TensorSpec) -> list[Copy]:
    """One copy for those that are steps of equal size in both, as experts are; else the same."""
    first = min(copies, key=lambda c: c.offset)
    if len(copies) < 2 or any(_kind(c) != _kind(first) for c in copies):
        return copies
    pairs = sorted((c.offset, c.to.storage_offset()) for c in copies)
    step, to_step = pairs[1][0] - pairs[0][0], pairs[1][1] - pairs[0][1]
    if (
        step <= 0
        or to_step <= 0
        or pairs != [(pairs[0][0] + n * step, pairs[0][1] + n * to_step) for n in range(len(pairs))]
    ):
        return copies
    # Several to a row: apart, so that the tensor can come in rows.
    inside = max(1, _row_size(spec.shape) // step)
    if len(pairs) % inside:
        inside = 1
    to = first.to.as_strided(
        (len(pairs) // inside, inside, *first.to.shape),
        (inside * to_step, to_step, *first.to.stride()),
        first.to.storage_offset(),
    )
    return [Copy(first.name, first.offset, (inside * step, step, *first.stride), to)]


def _kind(copy: Copy) -> tuple[Any, ...]:
    """The same for copies that differ in where they begin alone."""
    return copy.stride, copy.to.shape, copy.to.stride(), identity(copy.to), copy.to.dtype


def _row_size(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _by_rows(copy: Copy, row: int) -> bool:
    """Whether each row of the view lies in one row of the source, in their order."""
    if not copy.to.dim() or copy.stride[0] != row:
        return False
    inner = zip(copy.to.shape[1:], copy.stride[1:], strict=True)
    last: int = copy.offset % row + sum((n - 1) * s for n, s in inner)
    return last < row


def _part(
    copy: Copy, shape: tuple[int, ...], piece: Piece
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(destination, source) of the part of `copy` that lies in `piece`; None if there is none."""
    tensor, base = piece.tensor, piece.tensor.storage_offset()
    if tuple(tensor.shape) == tuple(shape):
        return copy.to, tensor.as_strided(copy.to.shape, copy.stride, base + copy.offset)
    row = _row_size(shape)
    if not _by_rows(copy, row):
        raise ValueError(
            f"{piece.name} came in pieces, which its place in the engine doesn't allow"
        )
    first, inside = divmod(copy.offset, row)
    start = max(0, piece.row - first)
    end = min(copy.to.shape[0], piece.row + tensor.shape[0] - first)
    if start >= end:
        return None
    to = copy.to[start:end]
    offset = base + (first + start - piece.row) * row + inside
    return to, tensor.as_strided(to.shape, copy.stride, offset)
