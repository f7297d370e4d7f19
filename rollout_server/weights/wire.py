"""What passes between the trainer's process and the engine's: its types, and nothing else.

Both sides import this module; it knows neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

# vLLM knows the loader of the policy's weights by this name.
LOAD_FORMAT = "rollout_server"
# The policy's LoRA adapter, in vLLM's numbering.
ADAPTER_ID = 1
# Where, in the engine's folder, the trainer says how its memory is asked for.
ADDRESS = "sharing.json"


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
# that the worker who opens it has too (`transport.place`).
Message = bytes | dict[str, bytes]


class TensorSpec(NamedTuple):
    """What the engine is told of a tensor before it has one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool = False


class View(NamedTuple):
    """A checkpoint's tensor `name` as elements of a contiguous tensor of the trainer."""

    name: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# What each of the trainer's tensors is in a checkpoint, by its name; none there: what it is here.
Views = Mapping[str, Sequence[View]]


class Slot(NamedTuple):
    """Memory for one of the engine's storages: `size` elements of a dtype, named as in torch."""

    size: int
    dtype: str


class Place(NamedTuple):
    """Where one of the trainer's tensors lives: in elements of its slot."""

    slot: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Layout:
    """Slots, the places of the trainer's tensors in them, and names that aren't in any."""

    slots: list[Slot]
    places: dict[str, Place]
    copied: list[str]
