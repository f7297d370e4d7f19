"""The memory behind tensors. Used in the engine's process; imports nothing of vLLM."""

from collections.abc import Iterable
from typing import Any

import torch


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
    return tensor.untyped_storage()._cdata
