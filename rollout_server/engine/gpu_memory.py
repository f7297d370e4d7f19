"""How much of a GPU an engine beside a trainer may have. Sizes in bytes; arithmetic alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.errors import OutOfMemoryError

GIB = 1 << 30
_CONTEXT = GIB  # CUDA's own for a process, and libraries' workspaces
_GRAPHS = GIB  # of vLLM's default sizes
_TOKENS, _SEQUENCES = 8192, 1024  # vLLM's largest defaults of a step


@dataclass(frozen=True)
class Need:
    """What an engine needs besides its KV cache. weights: that it holds, or shares with the
    trainer; overhead: for all else."""

    weights: int = 0
    overhead: int = 0


def utilization(free: int, total: int, given: float | None) -> float:
    """The share of the whole GPU that vLLM is told: the one `given`, or half of what is free."""
    return given or round(free / total / 2, 3)


def shared_kv_cache(free: int, total: int, given: float | None, need: Need) -> int:
    """Size of the KV cache where the weights are the trainer's, and so in use already.

    given: share of the whole GPU that the engine may use, weights included; None: half of what is
    free, besides the weights. `OutOfMemoryError` where nothing is left.
    """
    budget = free // 2 if given is None else min(free, int(given * total) - need.weights)
    left = budget - need.overhead
    if left <= 0:
        of = "half of what is free" if given is None else f"gpu_memory_utilization={given}"
        raise OutOfMemoryError(
            f"{of} ({max(budget, 0)} of {total} bytes of GPU memory, {free} free) is less than the "
            f"engine needs besides weights and KV cache ({need.overhead}); give more to "
            "gpu_memory_utilization, or say what the KV cache gets (kv_cache_memory_bytes)"
        )
    return left


def overhead(model_config: Any, itemsize: int, engine_args: Mapping[str, Any]) -> int:
    """An upper estimate of what an engine of one worker takes besides weights and KV cache.

    model_config: of transformers; itemsize: of the dtype that it computes in.
    """
    text = getattr(model_config, "get_text_config", lambda: model_config)()
    hidden = getattr(text, "hidden_size", 0) or 0
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    tokens = engine_args.get("max_num_batched_tokens") or _TOKENS
    sequences = engine_args.get("max_num_seqs") or _SEQUENCES
    # Residual, normalised input, q, k and v, attention's output; gate, up and their product.
    activations = tokens * (6 * hidden + 3 * inner) * itemsize
    # Logits in fp32, their log-softmax, and a copy that is sorted.
    logits = 3 * 4 * sequences * (getattr(text, "vocab_size", 0) or 0)
    graphs = 0 if engine_args.get("enforce_eager") else _GRAPHS
    return int(_CONTEXT + graphs + activations + logits)
