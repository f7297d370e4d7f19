"""vLLM's model loader, watched: what it writes where, and that it leaves nothing out.

What the loader does depends on names and shapes only, so it is watched once, at the start. Whatever
becomes of a tensor, as it is or computed, is followed through torch's operations: a tensor of the
trainer that reaches nothing in the engine is an error, and so is an element of a parameter that
nothing is written to, whichever way weights are to come in later.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from rollout_server.weights.storages import Watching, identity
from rollout_server.weights.wire import TensorSpec, Views
from rollout_server.worker.plan import Copy, Fill, Plan, checkpoint_tensors, merged


def record(
    model: Any,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    write: bool,
    views: Views | None = None,
) -> Plan:
    """Run `model.load_weights` on `tensors` and write down where each goes.

    model: a module of vLLM; specs: of all the trainer's tensors; tensors: by name, contiguous, on
    the meta device unless `write`, which lets the loader do its writes too; views: what of a
    checkpoint they are.

    Raises `ValueError` with the list of tensors that the model's loader refuses or that nothing in
    the model takes, and of parameters that get nothing, or not all.
    """
    plan = Plan(specs, views or {})
    recorder = _Recorder(model, plan, write)
    if write:
        _clear_padding(model)
    try:
        recorder.load(tensors)
    except Exception as error:
        refused = _refused(model, plan)
        why = f"vLLM's loader fails on the trainer's tensors: {type(error).__name__}: {error}"
        if refused or write:
            raise ValueError("\n".join(refused or [why])) from error
        plan.unsupported_reasons.append(why)
        return plan
    if lines := _left_out(plan, recorder.taken()) + recorder.unwritten():
        raise ValueError("\n".join(lines))
    plan.unsupported_reasons = list(dict.fromkeys(plan.unsupported_reasons))
    plan.copies = {name: merged(copies, specs[name]) for name, copies in plan.copies.items()}
    return plan


class _Recorder(Watching):
    """Sees every write into the model's parameters and buffers, and what it was made of."""

    def __init__(self, model: Any, plan: Plan, write: bool):
        super().__init__()
        self._model = model
        self._at_first = {identity(t) for t in [*model.parameters(), *model.buffers()]}
        self._plan = plan
        self._write = write
        self._name = ""
        self._sources: dict[int, str] = {}  # storages of the trainer's tensors
        self._made_of: dict[int, frozenset[str]] = {}  # storages of what was computed from them
        self._reached: set[str] = set()
        self._writes: list[torch.Tensor] = []

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give the model's loader the trainer's tensors, as a checkpoint has them."""
        with torch.no_grad(), self:
            self._model.load_weights(self._noted(tensors))

    def _noted(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for own, tensor in tensors:
            self._made_of.pop(identity(tensor), None)
            self._sources[identity(tensor)] = own
            yield from self._named(checkpoint_tensors(self._plan.views, [(own, tensor)]))

    def _named(
        self, tensors: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for self._name, tensor in tensors:
            yield self._name, tensor

    def taken(self) -> set[str]:
        """Names of the tensors that reached the model, or something else that keeps them."""
        now = [*self._model.parameters(), *self._model.buffers()]
        return self._reached.union(*(self._origins(t) for t in now))

    def unwritten(self) -> list[str]:
        """Lines about parameters with elements that nothing writes; notes padding in the plan.

        Those that the loader itself puts in another's place are its own affair.
        """
        plan, lines = self._plan, []
        written, filled = _by_storage(self._writes), _by_storage(f.to for f in plan.fills)
        for name, parameter in self._model.named_parameters():
            place, size = identity(parameter), parameter.numel()
            if size == 0 or place not in self._at_first:
                continue
            if place not in written:
                lines.append(
                    f"{name} {tuple(parameter.shape)}: the trainer has nothing for this parameter "
                    "of the engine"
                )
            elif left := _left(parameter, written[place] + filled.get(place, [])):
                what = f"{left} of the {size} elements of {name} aren't loaded"
                padding = left == size - _loadable(parameter)  # by vLLM's own account
                (plan.unsupported_reasons if padding else lines).append(what)
        return lines

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        origins = frozenset().union(*(self._origins(t) for t in given))
        changed = _changed(func, args, kwargs)
        of_model = [t for t in changed if identity(t) in self._at_first]
        if of_model:
            self._note(func, args, of_model)
        if changed:
            self._reached |= origins
            self._made_of |= {identity(t): origins | self._origins(t) for t in changed}
        if of_model and not self._write:
            return of_model[0]
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if not made and not changed:  # a number that Python goes on with
            self._reached |= origins
        known = {identity(t) for t in given}
        for tensor in made:
            # The memory may be that of an earlier tensor, which is gone.
            if (place := identity(tensor)) not in known:
                self._sources.pop(place, None)
                self._made_of[place] = origins
        return result

    def _origins(self, tensor: torch.Tensor) -> frozenset[str]:
        place = identity(tensor)
        if place in self._sources:
            return frozenset([self._sources[place]])
        return self._made_of.get(place, frozenset())

    def _note(self, func: Any, args: Any, changed: list[torch.Tensor]) -> None:
        aten = torch.ops.aten
        plan, to = self._plan, changed[0]
        if func is aten.fill_.Scalar:
            plan.fills.append(Fill(to.detach(), args[1]))
            return
        if func is aten.zero_.default:
            plan.fills.append(Fill(to.detach(), 0))
            return
        self._writes += [t.detach() for t in changed]
        name = self._sources.get(identity(args[1])) if func is aten.copy_.default else None
        if name is not None:
            view = args[1].expand_as(to)
            copy = Copy(name, view.storage_offset(), tuple(view.stride()), to.detach())
            plan.copies.setdefault(name, []).append(copy)
            return
        plan.rearranged |= {identity(t) for t in changed}
        if func is aten.copy_.default:
            reason = f"what becomes of {self._name} is computed while it is loaded"
        else:
            reason = f"{self._name} is written with {func}"
        plan.unsupported_reasons.append(reason)


def _by_storage(tensors: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    found: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        found.setdefault(identity(tensor), []).append(tensor)
    return found


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Arguments that an operation writes into."""
    changed = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            changed += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    return changed


def _refused(model: Any, plan: Plan) -> list[str]:
    """Lines about the tensors that the model's loader raises for, one by one."""
    lines = []
    for name, spec in plan.specs.items():
        source = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        recorder = _Recorder(model, Plan(plan.specs, plan.views), write=False)
        try:
            recorder.load([(name, source)])
        except Exception as error:
            why = str(error).strip() or type(error).__name__
            lines.append(f"{_called(name, plan)} {tuple(spec.shape)}: {why.splitlines()[0]}")
        else:
            if name not in recorder.taken() and not spec.is_buffer:
                lines.append(_untaken(name, plan))
    return lines


def _left_out(plan: Plan, taken: set[str]) -> list[str]:
    return [
        _untaken(name, plan)
        for name, spec in plan.specs.items()
        if name not in taken and not spec.is_buffer
    ]


def _untaken(name: str, plan: Plan) -> str:
    return f"{_called(name, plan)} {tuple(plan.specs[name].shape)}: nothing in the engine takes it"


def _called(name: str, plan: Plan) -> str:
    inside = [view.name for view in plan.views.get(name, ())]
    if not inside:
        return name
    more = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
    return f"{name} (in a checkpoint {inside[0]}{more})"


def _loadable(parameter: torch.Tensor) -> int:
    """How many elements vLLM means to load; fewer than there are where it pads experts."""
    number: int = getattr(parameter, "weight_loader_numel", parameter.numel())
    return number


def _clear_padding(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if _loadable(parameter) != parameter.numel():
            parameter.data.zero_()


def _left(parameter: torch.Tensor, views: list[torch.Tensor]) -> int:
    """Number of the parameter's elements that aren't in any of the views."""
    if any(_covers(view, parameter) for view in views):
        return 0
    size = max(_end(t) for t in [parameter, *views])
    device = "cpu" if parameter.is_meta else parameter.device
    painted = torch.zeros(size, dtype=torch.bool, device=device)
    for view in views:
        _like(painted, view).fill_(True)
    return int((~_like(painted, parameter)).sum())


def _covers(view: torch.Tensor, whole: torch.Tensor) -> bool:
    return _place(view) == _place(whole)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _like(flat: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    return flat.as_strided(view.shape, view.stride(), view.storage_offset())


def _end(view: torch.Tensor) -> int:
    steps = zip(view.shape, view.stride(), strict=True)
    if not view.numel():
        return 0
    return int(view.storage_offset()) + sum((n - 1) * s for n, s in steps) + 1
