"""Tensors of the trainer's process, opened in the engine's: nothing is copied on the way.

On a CPU a tensor's storage is moved into shared memory once, in place (every view of it moves
along), and opened by the engine through the trainer's file descriptor. Such memory has no name, so
none is left behind whatever ends the processes. On a GPU it is a CUDA IPC handle made by torch's
own reductions. Handles are made once and again only when a tensor's memory has changed.
"""

import io
import os
import pickle
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_SHM = "/dev/shm"


@dataclass(frozen=True)
class _SharedMemory:
    """A tensor in shared memory: descriptor `fd` of process `pid`, and where in it."""

    pid: int
    fd: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def open(self) -> torch.Tensor:
        fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR)
        try:
            storage = torch.UntypedStorage._new_shared_fd_cpu(fd, self.nbytes)
        finally:
            os.close(fd)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _CudaIpc:
    """A tensor on a GPU: a rebuild function of torch and its arguments."""

    rebuild: object
    arguments: tuple

    def open(self) -> torch.Tensor:
        arguments = list(self.arguments)
        arguments[6] = torch.cuda.current_device()  # the same GPU may have another index here
        return self.rebuild(*arguments)


class Exporter:
    """The trainer's side. Not thread-safe: used by one transition at a time."""

    def __init__(self):
        self._epoch = 0
        self._key: tuple | None = None
        self._staged: dict[str, torch.Tensor] = {}

    def export(self, tensors: Mapping[str, torch.Tensor]) -> bytes:
        """A message for `Importer.open`; small where nothing has moved since the last one.

        The caller's device work that wrote the tensors must be done or is waited for here.
        """
        key = tuple((name, _place(t)) for name, t in tensors.items())
        if key != self._key:
            self._staged = {}
            handles = [(name, self._handle(name, t)) for name, t in tensors.items()]
            self._epoch += 1
            # Sharing moves a storage, so its place is known only now.
            self._key = tuple((name, _place(t)) for name, t in tensors.items())
        else:
            handles = None
        for name, copy in self._staged.items():
            copy.copy_(tensors[name])
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        return pickle.dumps((self._epoch, handles))

    def forget(self) -> None:
        """Send all handles next time: the engine is a new one."""
        self._key = None

    def _handle(self, name: str, tensor: torch.Tensor):
        tensor = tensor.detach()
        if tensor.is_cuda:
            from torch.multiprocessing.reductions import reduce_tensor

            return _CudaIpc(*reduce_tensor(tensor))
        _allow_many_descriptors()
        storage = tensor.untyped_storage()
        fd = -1
        if storage.is_shared() or shutil.disk_usage(_SHM).free > 2 * storage.nbytes():
            fd, _ = storage._share_fd_cpu_()
        if fd < 0:
            # No room there (containers often have 64 MiB), or shared by name: a copy, in
            # anonymous memory.
            tensor = self._staged[name] = _anonymous_copy(tensor)
            fd, _ = tensor.untyped_storage()._share_fd_cpu_()
        return _SharedMemory(
            pid=os.getpid(),
            fd=fd,
            nbytes=tensor.untyped_storage().nbytes(),
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            offset=tensor.storage_offset(),
        )


class Importer:
    """The engine's side: keeps what it has opened until the trainer sends other handles."""

    def __init__(self):
        self._epoch = 0
        self._tensors: dict[str, torch.Tensor] = {}

    def open(self, message: bytes) -> dict[str, torch.Tensor]:
        """The trainer's tensors by name. They are the trainer's memory: read only."""
        epoch, handles = _Unpickler(io.BytesIO(message)).load()
        if handles is not None:
            self._tensors = {}  # let go of the old memory first
            _allow_many_descriptors()
            self._tensors = {name: handle.open() for name, handle in handles}
            self._epoch = epoch
        elif epoch != self._epoch:
            raise RuntimeError(f"handles of export {epoch} were never sent here")
        return self._tensors


class _Unpickler(pickle.Unpickler):
    """Rebuilds handles and nothing else."""

    def find_class(self, module, name):
        if module == __name__ or module.split(".")[0] == "torch":
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} isn't part of a tensor handle")


def _place(tensor: torch.Tensor) -> tuple:
    storage = tensor.untyped_storage()
    return (
        str(tensor.device), storage.data_ptr(), storage.nbytes(), tensor.storage_offset(),
        tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype,
    )  # fmt: skip


def _anonymous_copy(tensor: torch.Tensor) -> torch.Tensor:
    fd = os.memfd_create("rollout_server")
    try:
        nbytes = max(tensor.numel() * tensor.element_size(), 1)
        os.ftruncate(fd, nbytes)
        storage = torch.UntypedStorage._new_shared_fd_cpu(fd, nbytes)
    finally:
        os.close(fd)
    copy = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)
    return copy.copy_(tensor)


def _allow_many_descriptors() -> None:
    """One descriptor a tensor: raise the soft limit as far as it goes without rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
