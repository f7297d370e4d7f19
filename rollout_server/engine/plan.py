"""Where each of the trainer's tensors lands in the engine, so that a sync is copies alone.

vLLM's loader fuses, slices, casts and pads, name by name, in Python. What it does depends on names
and shapes only, so it is watched once: every write into the model becomes a `Copy` from a view of a
source tensor to a view of a parameter, or a `Fill`. Whatever isn't such a write is an obstacle, and
a plan with an obstacle isn't used. A plan covers each element of each parameter, or has an obstacle
that says which it leaves out.

Sources are contiguous and may come in pieces: some rows (of dimension 0) of the whole tensor.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout_server.engine.storages import identity


class Piece(NamedTuple):
    """Rows `row`, `row + 1`, ... of the tensor `name`; all of it where `tensor` has its shape."""

    name: str
    row: int
    tensor: torch.Tensor


class Part(NamedTuple):
    """Some of the pieces that make up the policy; parts are numbered from 0."""

    number: int
    last: bool
    pieces: list[Piece]


# What tells an engine of a part: handles of its tensors. Several ranks have one each, by the place
# that the worker who opens it has too (`weights.transport.place`).
Message = bytes | dict[str, bytes]


class TensorSpec(NamedTuple):
    """What the engine is told of a tensor before it has one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool = False


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
    """What `record` saw."""

    specs: Mapping[str, TensorSpec]
    copies: dict[str, list[Copy]] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not self.obstacles

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
        names = {}
        for piece in pieces:
            for to, source in zip(*self.pairs([piece]), strict=True):
                if not torch.equal(to, source.to(to.dtype)):
                    names[piece.name] = None
        return list(names)

    def stale(self, model: torch.nn.Module) -> list[str]:
        """Parameters of the model that have other memory than when the plan was made."""
        written = {identity(c.to) for copies in self.copies.values() for c in copies}
        return [n for n, p in model.named_parameters() if identity(p) not in written]


def record(
    model: Any, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]],
    write: bool,
) -> Plan:  # fmt: skip
    """Run `model.load_weights` on `tensors` and write down where each goes.

    model: a module of vLLM; specs: of all the trainer's tensors; tensors: by name, contiguous, on
    the meta device unless `write`, which lets the loader do its writes too.

    Raises `ValueError` with the list of tensors that the model's loader refuses or that nothing in
    the model takes, and of parameters that get nothing.
    """
    plan = Plan(specs)
    recorder = _Recorder(model, plan, write)
    try:
        with torch.no_grad(), recorder:
            model.load_weights(recorder.named(tensors))
    except Exception as error:
        refused = _refused(model, specs)
        if refused:
            raise ValueError("\n".join(refused)) from error
        plan.obstacles.append(
            f"vLLM's loader doesn't take one tensor at a time: {type(error).__name__}: {error}"
        )
        return plan
    _require_all_taken(model, plan)
    plan.obstacles += _uncovered(model, plan)
    return plan


class _Recorder(TorchDispatchMode):
    """Sees every write into the model's parameters and buffers while it is active."""

    def __init__(self, model: torch.nn.Module, plan: Plan, write: bool):
        super().__init__()
        self._model = {identity(t) for t in [*model.parameters(), *model.buffers()]}
        self._plan = plan
        self._write = write
        self._name = ""
        self._source = 0

    def named(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for self._name, tensor in tensors:
            self._source = identity(tensor)
            yield self._name, tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        written = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            and isinstance(value, torch.Tensor) and identity(value) in self._model
        ]  # fmt: skip
        if written:
            self._note(func, args, written[0])
            if not self._write:
                return written[0]
        return func(*args, **(kwargs or {}))

    def _note(self, func, args, to: torch.Tensor) -> None:
        aten = torch.ops.aten
        plan, name = self._plan, self._name
        if func is aten.copy_.default and identity(args[1]) == self._source:
            view = args[1].expand_as(to)
            plan.copies.setdefault(name, []).append(
                Copy(name, view.storage_offset(), tuple(view.stride()), to.detach())
            )
        elif func is aten.copy_.default:
            plan.obstacles.append(f"what becomes of {name} is computed while it is loaded")
        elif func is aten.fill_.Scalar:
            plan.fills.append(Fill(to.detach(), args[1]))
        elif func is aten.zero_.default:
            plan.fills.append(Fill(to.detach(), 0))
        else:
            plan.obstacles.append(f"{name} is written with {func}")


def _refused(model: Any, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Lines about the tensors that the model's loader raises for, one by one."""
    lines = []
    for name, spec in specs.items():
        source = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        plan = Plan(specs)
        recorder = _Recorder(model, plan, write=False)
        try:
            with torch.no_grad(), recorder:
                model.load_weights(recorder.named([(name, source)]))
        except Exception as error:
            why = str(error).strip() or type(error).__name__
            lines.append(f"{name} {tuple(spec.shape)}: {why.splitlines()[0]}")
        else:
            if not plan.copies and not plan.obstacles and not spec.is_buffer:
                lines.append(_untaken(name, spec))
    return lines


def _untaken(name: str, spec: TensorSpec) -> str:
    return f"{name} {tuple(spec.shape)}: nothing in the engine takes it"


def _require_all_taken(model: torch.nn.Module, plan: Plan) -> None:
    """Parameters that the loader left out, on either side."""
    if plan.obstacles:  # then what was taken isn't known in full
        return
    lines = [
        _untaken(name, spec)
        for name, spec in plan.specs.items()
        if name not in plan.copies and not spec.is_buffer
    ]
    written = {identity(c.to) for copies in plan.copies.values() for c in copies}
    lines += [
        f"{name} {tuple(parameter.shape)}: the trainer has nothing for this parameter of the engine"
        for name, parameter in model.named_parameters()
        if identity(parameter) not in written
    ]
    if lines:
        raise ValueError("\n".join(lines))


def _uncovered(model: torch.nn.Module, plan: Plan) -> list[str]:
    """Obstacles: parameters with elements that neither a copy nor a fill writes."""
    writes: dict[int, list[torch.Tensor]] = {}
    for to in [c.to for copies in plan.copies.values() for c in copies] + [
        f.to for f in plan.fills
    ]:
        writes.setdefault(identity(to), []).append(to)
    obstacles = []
    for name, parameter in model.named_parameters():
        views = writes.get(identity(parameter), [])
        if any(_covers(view, parameter) for view in views):
            continue
        size = max(_end(t) for t in [parameter, *views])
        painted = torch.zeros(size, dtype=torch.bool, device=parameter.device)
        for view in views:
            _like(painted, view).fill_(True)
        left = (~_like(painted, parameter)).sum().item()
        if left:
            obstacles.append(f"{left} of the {parameter.numel()} elements of {name} aren't loaded")
    return obstacles


def _covers(view: torch.Tensor, whole: torch.Tensor) -> bool:
    place = lambda t: (t.storage_offset(), t.shape, t.stride())  # noqa: E731
    return place(view) == place(whole)


def _like(flat: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    return flat.as_strided(view.shape, view.stride(), view.storage_offset())


def _end(view: torch.Tensor) -> int:
    steps = zip(view.shape, view.stride(), strict=True)
    return view.storage_offset() + sum((n - 1) * s for n, s in steps) + 1 if view.numel() else 0


def _row_size(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _by_rows(copy: Copy, row: int) -> bool:
    """Whether each row of the view lies in one row of the source, in their order."""
    if not copy.to.dim() or copy.stride[0] != row:
        return False
    inner = zip(copy.to.shape[1:], copy.stride[1:], strict=True)
    return copy.offset % row + sum((n - 1) * s for n, s in inner) < row


def _part(copy: Copy, shape: tuple[int, ...], piece: Piece):
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
