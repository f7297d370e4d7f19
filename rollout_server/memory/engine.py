"""Bounds of what the engine takes besides its weights and its KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.memory.kv_cache import head_size
from rollout_server.memory.sizes import GIB, KIB, MIB

# A CUDA context with the kernels of torch and cuBLAS, and its libraries' workspaces.
CONTEXT = 640 * MIB
_LARGEST_GRAPH = 512  # tokens
_GRAPH = 256 * KIB  # for each layer of each graph
_LOGIT = 26  # bytes besides its own: float32, probabilities, sorted, with int64 indices


@dataclass(frozen=True)
class Batch:
    """tokens: of one step; requests: at a time."""

    tokens: int
    requests: int

    @classmethod
    def of(cls, total: int, engine_args: Mapping[str, Any]) -> "Batch":
        """vLLM's defaults for a server on a GPU of `total` bytes, unless options say otherwise."""
        tokens, requests = (2048, 256) if total < 70 * GIB else (8192, 1024)
        if total >= 160 * GIB:
            tokens = 16384
        requests = engine_args.get("max_num_seqs") or requests
        return cls(max(engine_args.get("max_num_batched_tokens") or tokens, requests), requests)


def activation_bytes(config: Any, batch: Batch, element_size: int, tensor_parallel: int) -> int:
    """The most that one step needs for a while: a layer's, and the sampler's."""
    config = config.get_text_config(decoder=True)
    size, hidden = head_size(config), config.hidden_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = (2 * heads + 2 * kv_heads) * size // tensor_parallel
    if getattr(config, "kv_lora_rank", None) is not None:
        attention *= 2  # keys and values of a prompt are made from its latents
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None)
    if isinstance(experts, int):
        each = getattr(config, "moe_intermediate_size", None) or inner
        inner = max(inner, experts * (each + hidden * tensor_parallel // 3))
    numbers = 4 * hidden + attention + 3 * inner // tensor_parallel
    logits = batch.requests * config.vocab_size * (element_size + _LOGIT)
    return int(batch.tokens * numbers * element_size + logits)


def graph_bytes(config: Any, batch: Batch, eager: bool) -> int:
    """Of CUDA graphs: one whole, and one in pieces, for each size of a batch."""
    if eager:
        return 0
    largest = min(_LARGEST_GRAPH, 2 * batch.requests)
    sizes = 3 + min(largest, 256) // 8 + max(0, largest - 256) // 16
    layers: int = config.get_text_config(decoder=True).num_hidden_layers
    return 2 * sizes * layers * _GRAPH
