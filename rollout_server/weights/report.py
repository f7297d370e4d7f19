"""What came of a weight sync."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    Attributes:
        version: policy version from now on.
        bytes: how much was copied into the engine, as it is in the trainer.
        seconds: from the call until requests flowed again.
        wake_seconds: of these, those that waking took; 0 if the engine was awake.
        path: how the weights went. "plan": copied to where they are used; "share": they are there
            already; "adapter": a LoRA adapter alone, the base being there; "layerwise": vLLM's
            layerwise reload; "load_weights": vLLM's loader.
        reason: why one of the last two.
        tensors: number of tensors, or of pieces of them.
        verified: whether what the engine holds was compared with the policy.
    """

    version: int
    bytes: int
    seconds: float
    wake_seconds: float
    path: str
    reason: str
    tensors: int
    verified: bool
