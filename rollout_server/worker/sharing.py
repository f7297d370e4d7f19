"""One copy of the weights: the engine's parameters become views of the trainer's memory.

The engine computes with fused tensors (q, k and v are rows of one), so the memory is laid out as
the engine wants it: a slot for each of its parameters' storages, and for each of the trainer's
tensors a place in a slot. The trainer allocates the slots, moves its parameters there, and sends
handles; all this happens while the engine loads its model, before anything has captured an address.

    engine: Layout ->            trainer: allocates, copies, rebinds
    engine: binds <- handles
"""

import json
import math
import os
from collections.abc import Sequence
from multiprocessing.connection import Client

import torch

from rollout_server.weights.storages import identity
from rollout_server.weights.wire import ADDRESS, Layout, Place, Slot
from rollout_server.worker.plan import Plan
from rollout_server.worker.unallocated import give_memory


def layout(model: torch.nn.Module, plan: Plan) -> Layout:
    """The layout that makes every copy of `plan` one from a place to itself.

    Tensors that land in buffers stay apart and are copied. Raises `ValueError` with the list of
    what stands in the way.
    """
    lines = list(plan.unsupported_reasons)
    firsts = _firsts(model)
    numbers = {identity(p): number for number, p in enumerate(firsts)}
    places, copied = {}, []
    for name, copies in plan.copies.items():
        spec, to = plan.specs[name], copies[0].to
        if all(identity(c.to) not in numbers for c in copies):
            copied.append(name)
        elif len(copies) > 1:
            lines.append(f"{name} goes to {len(copies)} places")
        elif to.dtype != spec.dtype:
            lines.append(f"{name} is {_name(spec.dtype)}, the engine's is {_name(to.dtype)}")
        elif copies[0].offset or to.numel() != math.prod(spec.shape):
            lines.append(f"only a part of {name} is used")
        elif tuple(to.shape) != spec.shape and not to.is_contiguous():
            lines.append(f"{name} changes its shape")
        else:
            stride = to.stride() if tuple(to.shape) == spec.shape else _dense(spec.shape)
            number = numbers[identity(to)]
            places[name] = Place(number, int(to.storage_offset()), spec.shape, tuple(stride))
    lines += [f"the engine sets elements to {f.value}" for f in plan.fills if f.value]
    if lines:
        raise ValueError("; ".join(lines))
    slots = [Slot(p.untyped_storage().nbytes() // p.element_size(), _name(p.dtype)) for p in firsts]
    return Layout(slots, places, copied)


def bind(model: torch.nn.Module, folder: str, wanted: Layout, device: torch.device) -> None:
    """Ask the trainer for the memory of a layout, which is on `device`, and have the model's
    parameters be in it."""
    with open(os.path.join(folder, ADDRESS), encoding="utf-8") as f:
        told = json.load(f)
    with Client(told["address"], "AF_UNIX", authkey=bytes.fromhex(told["key"])) as trainer:
        trainer.send((torch.__version__, wanted))
        handles = trainer.recv()
    if isinstance(handles, str):
        raise RuntimeError(handles)
    slots = [handle.open() for handle in handles]
    numbers = {identity(p): number for number, p in enumerate(_firsts(model))}
    for parameter, number in [(p, numbers[identity(p)]) for p in model.parameters()]:
        empty = torch.empty(0, dtype=parameter.dtype, device=device)
        offset = parameter.storage_offset()
        memory = empty.set_(slots[number], offset, parameter.shape, parameter.stride())
        give_memory(parameter, memory)


def _firsts(model: torch.nn.Module) -> list[torch.Tensor]:
    """A parameter for each storage, in the order of the slots."""
    found: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        found.setdefault(identity(parameter), parameter)
    return list(found.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.empty(tuple(shape), device="meta").stride())
