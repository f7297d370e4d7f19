"""Tensors of the trainer's process, opened in the engine's: nothing is copied on the way.

On a CPU a tensor's storage is moved into shared memory once, in place (every view of it moves
along), and opened by the engine through the trainer's file descriptor. Such memory has no name, so
none is left behind whatever ends the processes. On a GPU it is a CUDA IPC handle made by torch's
own reductions. Handles are made once and again only when a tensor's memory has changed.
"""

import io
import math
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rollout_server.errors import WeightSyncError
from rollout_server.weights.exports import Exports
from rollout_server.weights.wire import Part, Piece

_SHM = "/dev/shm"
_CPU = torch.device("cpu")
_REMEDY = (
    "; if the trainer runs with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, set "
    "expandable_segments:False"
)


@dataclass(frozen=True)
class SharedMemory:
    """A storage in shared memory: descriptor `fd` of process `pid`."""

    pid: int
    fd: int
    nbytes: int

    def open(self) -> torch.UntypedStorage:
        fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR)
        try:
            return _opened(fd, self.nbytes)
        finally:
            os.close(fd)

    @property
    def counter_file(self) -> None:
        return None

    def release(self) -> None:
        """The system counts who has it mapped."""


@dataclass(frozen=True)
class CudaIpc:
    """A storage on a GPU: a rebuild function of torch and its arguments."""

    rebuild: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]

    def open(self) -> torch.UntypedStorage:
        arguments = list(self.arguments)
        arguments[6] = torch.cuda.current_device()  # the same GPU may have another index here
        try:
            return self.rebuild(*arguments).untyped_storage()
        except RuntimeError as error:
            raise RuntimeError(
                f"CUDA refuses to open the trainer's memory ({error}){_REMEDY}"
            ) from error

    @property
    def counter_file(self) -> str:
        name: bytes = self.arguments[11]
        return name.decode().removeprefix("/")

    def release(self) -> None:
        """Once too often does no harm: memory waits while the count is above 0."""
        kind: Any = torch.UntypedStorage
        kind._release_ipc_counter(*self.arguments[11:13])


class _View(NamedTuple):
    """A piece as a contiguous view of one of the storages that go with it."""

    name: str
    row: int
    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def of(self, storages: list[torch.UntypedStorage]) -> Piece:
        storage = storages[self.storage]
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return Piece(self.name, self.row, empty.set_(storage, self.offset, self.shape, strides))


Handle = SharedMemory | CudaIpc
_Handles = tuple[list[Handle], list[_View]]


class Opened(NamedTuple):
    """What a message brought: `pieces` of the part `number`, the same objects in every `epoch`."""

    number: int
    epoch: int
    pieces: list[Piece]

    @property
    def bytes(self) -> int:
        return sum(p.tensor.numel() * p.tensor.element_size() for p in self.pieces)


@dataclass
class _Exported:
    """What the engine has been told of one part."""

    epoch: int
    key: list[tuple[Any, ...]]
    staged: dict[int, torch.Tensor]


class Exporter:
    """The trainer's side. Not thread-safe: used by one transition at a time."""

    def __init__(self, exports: Exports | None = None) -> None:
        """exports: takes what is given to the engine, by the number of the part."""
        self._exports = exports or Exports()
        self._parts: dict[int, _Exported] = {}
        self._epoch = 0

    def export(self, part: Part) -> bytes:
        """A message for `Importer.open`; small where nothing has moved since the last one.

        The device work that wrote the tensors is waited for here.
        """
        pieces = part.pieces
        sent = self._parts.get(part.number)
        if sent is None or sent.key != _places(pieces):
            handles: _Handles | None
            sent, handles, storages = self._share(pieces)
            self._parts[part.number] = sent
            self._exports.give(part.number, handles[0], storages)
        else:
            handles = None
        for index, copy in sent.staged.items():
            copy.copy_(pieces[index].tensor)
        for device in {place[-1] for place in sent.key} - {_CPU}:
            torch.cuda.synchronize(device)  # a thread's current device may be another
        return pickle.dumps((torch.__version__, part.number, sent.epoch, handles))

    def has(self, first: int = 0) -> bool:
        """Whether a part from number `first` on was sent."""
        return any(number >= first for number in self._parts)

    def forget(self, first: int = 0) -> None:
        """Send handles anew next time, from part number `first` on. The engine is to let go of them
        before this, since torch keeps what another process has open."""
        self._parts = {number: sent for number, sent in self._parts.items() if number < first}

    def _share(
        self, pieces: Sequence[Piece]
    ) -> tuple[_Exported, _Handles, list[torch.UntypedStorage]]:
        """(what is kept of it, what the engine is told, the memory itself)."""
        _allow_many_descriptors()
        self._epoch += 1
        staged: dict[int, torch.Tensor] = {}
        places: dict[int, int] = {}
        handles: list[Handle] = []
        storages: list[torch.UntypedStorage] = []
        views: list[_View] = []
        for index, (name, row, tensor) in enumerate(pieces):
            tensor = tensor.detach()
            if not tensor.is_contiguous() or not _in_shared_memory(tensor):
                tensor = staged[index] = shared_empty(tensor.shape, tensor.dtype, tensor.device)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in places:
                places[storage.data_ptr()] = len(storages)
                storages.append(storage)
                handles.append(handle(storage))
            place = places[storage.data_ptr()]
            views.append(
                _View(
                    name,
                    row,
                    place,
                    tensor.dtype,
                    tuple(tensor.shape),
                    int(tensor.storage_offset()),
                )
            )
        # Sharing moves a storage, so its place is known only now.
        return _Exported(self._epoch, _places(pieces), staged), (handles, views), storages


class Importer:
    """The engine's side: keeps what it has opened until the trainer sends other handles."""

    def __init__(self) -> None:
        self._parts: dict[int, Opened] = {}

    def open(self, message: bytes) -> Opened:
        """The trainer's tensors. They are the trainer's memory: read only."""
        version, number, epoch, handles = _Unpickler(io.BytesIO(message)).load()
        if version != torch.__version__:
            raise RuntimeError(
                f"the trainer has torch {version}, the engine {torch.__version__}: handles of "
                "tensors can't be passed between them; install one torch for both"
            )
        if handles is not None:
            self._parts.pop(number, None)  # let go of the old memory first
            _allow_many_descriptors()
            storages = [handle.open() for handle in handles[0]]
            self._parts[number] = Opened(number, epoch, [view.of(storages) for view in handles[1]])
        opened = self._parts.get(number)
        if opened is None or opened.epoch != epoch:
            raise RuntimeError(f"handles of export {epoch} were never sent here")
        return opened

    def forget(self, first: int = 0) -> None:
        """Let go of the parts from number `first` on."""
        self._parts = {number: part for number, part in self._parts.items() if number < first}


def place(device: torch.device, rank: int) -> str:
    """What a rank's memory and the worker that opens it, number `rank` of its engine, both have."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return f"{device.type}:{rank}"


class _Unpickler(pickle.Unpickler):
    """Rebuilds handles and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ or module.split(".")[0] == "torch":
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} isn't part of a tensor handle")


def shared_empty(
    shape: Iterable[int], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """An uninitialised contiguous tensor in memory that `handle` can share."""
    shape = tuple(shape)
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # Anonymous memory: /dev/shm has 64 MiB in many containers.
    fd = os.memfd_create("rollout_server")
    try:
        nbytes = max(math.prod(shape) * dtype.itemsize, 1)
        os.ftruncate(fd, nbytes)
        storage = _opened(fd, nbytes)
    finally:
        os.close(fd)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)


def handle(storage: torch.UntypedStorage) -> Handle:
    """What another process opens a storage with; valid while the storage lives."""
    if storage.device.type == "cpu":
        return SharedMemory(os.getpid(), storage._share_fd_cpu_()[0], storage.nbytes())
    from torch.multiprocessing.reductions import reduce_tensor

    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    try:
        return CudaIpc(*reduce_tensor(flat))
    except RuntimeError as error:
        raise WeightSyncError(
            f"CUDA gives no handle of the policy's memory ({error}){_REMEDY}"
        ) from (error)


def _opened(fd: int, nbytes: int) -> torch.UntypedStorage:
    """A storage over a file's memory, which it keeps mapped after the descriptor is closed."""
    kind: Any = torch.UntypedStorage  # its shared-memory side has no types
    storage: torch.UntypedStorage = kind._new_shared_fd_cpu(fd, nbytes)
    return storage


def _in_shared_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor's storage can be opened elsewhere; moves it there if there is room."""
    storage = tensor.untyped_storage()
    if storage.device.type != "cpu":
        return True
    if not storage.is_shared() and shutil.disk_usage(_SHM).free < 2 * storage.nbytes():
        return False
    descriptor: int = storage._share_fd_cpu_()[0]
    return descriptor >= 0  # -1: shared by name, by someone else


def _places(pieces: Sequence[Piece]) -> list[tuple[Any, ...]]:
    return [(n, row, t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for n, row, t in pieces]


def _allow_many_descriptors() -> None:
    """One descriptor a tensor: raise the soft limit as far as it goes without rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
