"""Which source fits a policy: told from how its trainer has wrapped it."""

from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rollout_server.errors import NotAvailableError
from rollout_server.weights.sources.base import Source, bare_model, policy_tensors


def source_of(model: Any, peft: str = "merge") -> Source:
    """The policy's tensors as they are now; peft: how those of a PEFT model go, "merge" or
    "adapter". The first call for an FSDP1 model is collective."""
    model = bare_model(model)
    if hasattr(model, "peft_config"):
        return _of_peft(model, peft)
    if type(model).__name__ == "FullyShardedDataParallel":
        from rollout_server.weights.sources.fsdp1 import FSDP1Source

        return FSDP1Source(model)
    if _is_fsdp2(model):
        from rollout_server.weights.sources.fsdp2 import FSDP2Source

        return FSDP2Source(model)
    tensors = policy_tensors(model)
    if any(hasattr(t, "ds_id") for t in tensors.values()):
        from rollout_server.weights.sources.zero3 import ZeRO3Source

        return ZeRO3Source(tensors)
    if any(isinstance(t, DTensor) for t in tensors.values()):  # by tensor parallel alone
        from rollout_server.weights.sources.fsdp2 import FSDP2Source

        return FSDP2Source(model)
    return Source(tensors)


def _is_fsdp2(model: Any) -> bool:
    """By its modules: after a forward pass the parameters may all be there in full."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _of_peft(model: Any, how: str) -> Source:
    from rollout_server.weights.sources.peft import Merged, WithAdapter

    if not hasattr(model, "get_base_model") or any(
        config.is_prompt_learning for config in model.peft_config.values()
    ):
        raise NotAvailableError(
            f"the policy is a {type(model).__name__} whose adapter isn't in the layers' weights, "
            "which vLLM can't serve; train with LoRA or another tuner of weights"
        )
    if _is_fsdp2(model) or any(
        isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()
    ):
        raise NotAvailableError(
            "the policy is a PEFT model that is sharded as well, which this version can't gather; "
            "use DDP: the frozen base takes no gradients and no optimizer's state"
        )
    return WithAdapter(model) if how == "adapter" else Merged(model)
