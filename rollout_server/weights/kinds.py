"""Which source fits a policy: told from how its trainer has wrapped it."""

from typing import Any

from torch.distributed.tensor import DTensor

from rollout_server.errors import NotAvailableError
from rollout_server.weights.source import Source, bare_model, policy_tensors


def source_of(model: Any) -> Source:
    """The policy's tensors as they are now. With FSDP1 this is collective."""
    model = bare_model(model)
    if hasattr(model, "peft_config"):
        raise NotAvailableError("the policy is a PEFT model, which this version can't read")
    if type(model).__name__ == "FullyShardedDataParallel":
        from rollout_server.weights.fsdp1 import ShardedByUnits

        return ShardedByUnits(model)
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        from rollout_server.weights.zero3 import Partitioned

        return Partitioned(model)
    if any(isinstance(p, DTensor) for p in parameters):
        from rollout_server.weights.fsdp2 import ShardedByRows

        return ShardedByRows(model)
    return Source(policy_tensors(model))
