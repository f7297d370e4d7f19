"""The memory behind tensors. Used in the engine's process; imports nothing of vLLM."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def flat(tensors: Any) -> Iterable[torch.Tensor]:
    """The tensors of nested lists; vLLM keeps its KV cache in such."""
    if isinstance(tensors, torch.Tensor):
        yield tensors
        return
    for inner in tensors:
        yield from flat(inner)


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Address to storage, each storage once however many tensors view it."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def identity(tensor: torch.Tensor) -> int:
    """The same for all views of one storage; an address wouldn't do where it is released."""
    number: int = tensor.untyped_storage()._cdata
    return number


class Watching(TorchDispatchMode):
    """While it is active, torch's operations come to `__torch_dispatch__`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
