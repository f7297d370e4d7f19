"""Parameters without memory, while a model is built whose memory is the trainer's. Runs in the
engine's process.

vLLM allocates a model in full before it loads anything. With colocate="share" that would be one
more copy of the weights at the start, beside the trainer's. Here each parameter moves to torch's
meta device as it is put into its module, so that one at a time is there; it stays the same object,
with all that vLLM has hung on it. Buffers, and whatever else a model computes, are real.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Unallocated:
    """From its making until `end`, parameters that are put into a module lose their memory.

    Attributes:
        ended: whether `end` was called.
    """

    def __init__(self) -> None:
        self._hook = register_module_parameter_registration_hook(_to_meta)
        self.ended = False

    def end(self) -> None:
        self._hook.remove()
        self.ended = True


def built(build: Callable[[], T], hooked: Unallocated, compilation: Any, name: str) -> T:
    """`build()`, and if that fails before `hooked` has ended, once more without it.

    compilation: vLLM's `CompilationConfig`, where a model notes its layers; name: of the model.
    """
    before = {key: value.copy() for key, value in _notes(compilation).items()}
    try:
        return build()
    except Exception as error:
        if hooked.ended:  # the model was built, and what came then failed
            raise
        _log.warning(
            "%s can't be built without memory for its parameters (%s: %s): at the start they are "
            "there once more than the trainer's",
            name,
            type(error).__name__,
            error,
        )
    finally:
        hooked.end()
    for key, value in before.items():
        setattr(compilation, key, value)
    return build()


def give_memory(parameter: torch.nn.Parameter, memory: torch.Tensor) -> None:
    """Have the parameter be `memory`, of its shape and dtype, on whatever device; it stays the same
    object."""
    other = torch.Tensor._make_subclass(type(parameter), memory, parameter.requires_grad)
    other.__dict__ = dict(parameter.__dict__)
    torch.utils.swap_tensors(parameter, other)


def allocate(model: torch.nn.Module, device: torch.device) -> None:
    """Give parameters without memory some of their own, uninitialised."""
    for parameter in model.parameters():
        if parameter.is_meta:
            give_memory(parameter, torch.empty_like(parameter, device=device))


def _to_meta(module: torch.nn.Module, name: str, parameter: Any) -> None:
    if parameter is None or parameter.is_meta or isinstance(parameter, UninitializedParameter):
        return
    with torch.no_grad():
        give_memory(parameter, parameter.data.to("meta"))


def _notes(compilation: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(compilation).items() if isinstance(v, (dict, list, set))}
