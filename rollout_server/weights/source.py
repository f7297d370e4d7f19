"""The policy's weights by the names under which vLLM expects them."""

from typing import Any

import torch

from rollout_server.errors import NotAvailableError, UnsupportedModelError

# What wrappers inside a model put into a parameter's name: torch.compile, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def bare_model(model: Any) -> torch.nn.Module:
    """The module inside DDP and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def policy_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Name to full tensor, of every parameter and persistent buffer, as a checkpoint names them.

    Tied tensors come once, under their first name, where the config says that they are tied.
    The tensors are the live ones: nothing is copied.
    """
    model = bare_model(model)
    _refuse_what_is_not_there_yet(model)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    found = dict(model.named_parameters(remove_duplicate=tied))
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            found[name] = buffer
    tensors = {_plain(name): tensor.detach() for name, tensor in found.items()}
    if not tensors:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters to serve")
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device, without values; load the weights before attach()"
            )
    return tensors


def _plain(name: str) -> str:
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _refuse_what_is_not_there_yet(model: torch.nn.Module) -> None:
    def refuse(kind: str):
        raise NotAvailableError(
            f"the policy is {kind}, whose weights this version can't gather; "
            "train with a plain or DDP model"
        )

    if hasattr(model, "peft_config"):
        refuse("a PEFT model")
    if type(model).__name__ == "FullyShardedDataParallel":
        refuse("wrapped by FSDP")
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            refuse("partitioned by DeepSpeed ZeRO-3")
        if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "placements"):
            refuse("sharded by FSDP2 or tensor parallel")
