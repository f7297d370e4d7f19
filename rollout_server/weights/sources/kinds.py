"""Which source fits a policy: told from how its trainer has wrapped it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rollout_server.errors import NotAvailableError
from rollout_server.weights.sources import fsdp2, zero3
from rollout_server.weights.sources.base import (
    Source,
    bare_model,
    modules_of,
    parameters_in,
    policy_tensors,
)


def source_of(model: Any, peft: str = "merge") -> Source:
    """The policy's tensors as they are now; peft: how those of a PEFT model go, "merge" or
    "adapter". The first call for an FSDP1 model is collective."""
    model = bare_model(model)
    has_adapter = hasattr(model, "peft_config")
    if type(model).__name__ == "FullyShardedDataParallel":
        if has_adapter:
            raise NotAvailableError(
                "the policy is a PEFT model under FSDP1, whose flat parameters this version can't "
                "take apart; use FSDP2 (fsdp_version: 2 in accelerate's configuration), ZeRO-3 or "
                "DDP"
            )
        from rollout_server.weights.sources.fsdp1 import FSDP1Source

        return FSDP1Source(model)
    walked = modules_of(model)
    fsdp2.reshard(walked)
    kind = _kind(parameters_in(walked))
    if has_adapter:
        return _of_peft(model, peft, kind)
    return (kind or Source)(policy_tensors(model, walked))


def _kind(tensors: Iterable[torch.Tensor]) -> Any:
    """The source of tensors that are sharded; None: they aren't."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):  # FSDP2's, or tensor parallel's
            return fsdp2.FSDP2Source
        if hasattr(tensor, "ds_id"):
            return zero3.ZeRO3Source
    return None


def _of_peft(model: Any, how: str, kind: Any) -> Source:
    from rollout_server.weights.sources.peft import Merged, WithAdapter
    from rollout_server.weights.sources.sharded_peft import ShardedMerged, ShardedWithAdapter

    if not hasattr(model, "get_base_model") or any(
        config.is_prompt_learning for config in model.peft_config.values()
    ):
        raise NotAvailableError(
            f"the policy is a {type(model).__name__} whose adapter isn't in the layers' weights, "
            "which vLLM can't serve; train with LoRA or another tuner of weights"
        )
    if kind is not None:
        return (ShardedWithAdapter if how == "adapter" else ShardedMerged)(model, kind)
    return WithAdapter(model) if how == "adapter" else Merged(model)
