"""What passes between the trainer's process and the engine's: its types, and nothing else.

Both sides import this module; it knows neither. What a worker answers goes through vLLM, which
carries plain values, or from rank to rank; it is packed into bytes here, and read by its type.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch

# vLLM knows the loader of the policy's weights by this name.
LOAD_FORMAT = "rollout_server"
# The policy's LoRA adapter, in vLLM's numbering.
ADAPTER_ID = 1
# Where, in the engine's folder, the trainer says how its memory is asked for.
ADDRESS = "sharing.json"
# There too: names of torch's files in shared memory that count who has the trainer's memory open.
COUNTERS = "counters.txt"
# A copy of so many bytes in a CPU engine's process goes past the cache, which it would only empty.
STREAMED_BYTES = 1 << 20
# What one write into a pipe takes as a whole, always (PIPE_BUF).
LINE_BYTES = 4096
LENGTH_BYTES = 4  # before an answer, and tell its length


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


Parts = Generator[Part, None, None]  # closed by whoever takes them, also before their end


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


class WorkerDescription(msgspec.Struct, frozen=True):
    """What one worker of an engine says of itself, once its model is loaded.

    Attributes:
        device: named as in torch.
        weight_bytes, kv_cache_bytes: as allocated; weights that are the trainer's memory count 0.
        refused: the model and the trainer's tensors don't fit, line by line; empty: they do.
        unshareable: why engine and trainer can't have one memory; empty: they have, or needn't.
        unsupported_reasons: why weights can't be copied to where they are used; none: they can.
        repacked: those of the reasons that are layers which vLLM has rearranged.
        splittable: names of the trainer's tensors that may come in pieces.
        dtypes: name of a tensor to torch's name of the dtype that the worker holds it in.
        refits: a sync can be one message (see worker/refit.py).
    """

    device: str
    weight_bytes: int
    kv_cache_bytes: int
    refused: str = ""
    unshareable: str = ""
    unsupported_reasons: list[str] = []
    repacked: list[str] = []
    splittable: list[str] = []
    dtypes: dict[str, str] = {}
    refits: bool = False


class EngineDescription(msgspec.Struct, frozen=True):
    """What holds for an engine: the same of all of its workers, in the order of their ranks."""

    workers: list[WorkerDescription]

    @property
    def device(self) -> str:
        """The first worker's, named as in torch."""
        return self.workers[0].device

    @property
    def refused(self) -> str:
        return next((w.refused for w in self.workers if w.refused), "")

    @property
    def unshareable(self) -> str:
        return next((w.unshareable for w in self.workers if w.unshareable), "")

    @property
    def unsupported_reasons(self) -> list[str]:
        return united(w.unsupported_reasons for w in self.workers)

    @property
    def repacked(self) -> list[str]:
        return united(w.repacked for w in self.workers)

    @property
    def splittable(self) -> set[str]:
        """Names of the tensors that every worker can take in pieces."""
        return set.intersection(*(set(w.splittable) for w in self.workers))

    @property
    def refits(self) -> bool:
        """Whether a sync can be one message."""
        return len(self.workers) == 1 and self.workers[0].refits

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name of a tensor to the dtype that the engine holds it in."""
        return {name: getattr(torch, dtype) for name, dtype in self.workers[0].dtypes.items()}


class Written(msgspec.Struct, frozen=True, tag=True):
    """A part was taken: bytes and number of the tensors, or pieces of them, that were read."""

    bytes: int
    tensors: int


class Compared(msgspec.Struct, frozen=True, tag=True):
    """A part was compared: names of the tensors that differ from what the engine holds."""

    mismatched: list[str]


class Forgotten(msgspec.Struct, frozen=True, tag=True):
    """The trainer's memory was let go of."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A worker couldn't do what it was asked: the traceback."""

    error: str


class LineCall(msgspec.Struct, frozen=True):
    """A sync in one message, that goes by a pipe: at most `LINE_BYTES` when packed."""

    number: int
    message: bytes | None
    version: str


class LineAnswer(msgspec.Struct, frozen=True):
    """The workers' reports to the call of that number; or the error that it ended with."""

    number: int
    reports: list[bytes] = []
    error: str = ""


Report = Written | Compared | Forgotten | Failed
T = TypeVar("T")


def pack(value: Any) -> bytes:
    """A value of the types above, of builtins, or of named tuples and structs of such."""
    return msgspec.msgpack.encode(value)


def unpack(data: bytes, kind: type[T]) -> T:
    """What was packed, which must be of the type `kind`; `msgspec.ValidationError` otherwise."""
    return msgspec.msgpack.decode(data, type=kind)


def unpack_report(data: bytes, kind: type[T]) -> T | Failed:
    """The `Report` that was packed: of the type `kind`, or that of a failure."""
    report: T | Failed = msgspec.msgpack.decode(data, type=kind | Failed)
    return report


def united(lists: Iterable[Iterable[str]]) -> list[str]:
    """The lines of all lists, each once, in their order."""
    return list(dict.fromkeys(line for lines in lists for line in lines))
