"""What the engine's KV cache holds for a token, by the model's config.

vLLM divides its KV cache into blocks of tokens. Layers that keep the same of a request (all tokens;
those of a window) make groups of equal size, and each group takes its blocks from one pool.
`tests/memory/test_kv_cache.py` compares this with vLLM's own code.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rollout_server.errors import UnsupportedModelError

BLOCK = 16  # tokens, vLLM's usual


@dataclass(frozen=True)
class Kept:
    """What one layer keeps. token_bytes: for each token; window: of how many tokens at most, None:
    all; state_bytes: for each request, however long."""

    token_bytes: int
    window: int | None = None
    state_bytes: int = 0


@dataclass(frozen=True)
class KVCache:
    """layers: number of layers by what they keep; batched: tokens of one step (vLLM's
    max_num_batched_tokens), for which a window holds room beside its own."""

    layers: tuple[tuple[Kept, int], ...]
    batched: int

    @property
    def token_bytes(self) -> int:
        """Of all layers, for a token that none has dropped."""
        return sum(kept.token_bytes * number for kept, number in self.layers)

    def request_bytes(self, tokens: int) -> int:
        """For one request of so many tokens, in whole blocks."""
        numbers = [number for _, number in self.layers]
        size = max(numbers) if max(numbers) < 1.5 * min(numbers) else min(numbers)
        page = max(BLOCK * kept.token_bytes for kept, _ in self.layers)
        page = max([page, *(kept.state_bytes for kept, _ in self.layers)])
        tokens_a_block = page // max(kept.token_bytes for kept, _ in self.layers)
        return sum(
            math.ceil(number / size) * size * page * self._blocks(kept, tokens, tokens_a_block)
            for kept, number in self.layers
        )

    def _blocks(self, kept: Kept, tokens: int, each: int) -> int:
        if kept.state_bytes:
            return 1
        if kept.window is None:
            return math.ceil(tokens / each)
        # One more, since a window doesn't begin where a block does.
        return math.ceil(min(tokens, kept.window - 1 + self.batched) / each) + 1

    def tokens_in(self, size: int, longest: int) -> int:
        """How many tokens of requests of the `longest` length a KV cache of `size` bytes holds."""
        return int(size / self.request_bytes(longest) * longest)


def kv_cache_of(config: Any, element_size: int, tensor_parallel: int, batched: int) -> KVCache:
    """From a transformers config. element_size: bytes of a number in the KV cache.

    Raises `UnsupportedModelError` for layers of which it isn't known here what they keep.
    """
    config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError("what an encoder-decoder model keeps isn't known here")
    kinds: list[str] = getattr(config, "layer_types", None) or _same(config)
    counted = Counter(_kept(kind, config, element_size, tensor_parallel) for kind in kinds)
    return KVCache(tuple(counted.items()), batched)


def _same(config: Any) -> list[str]:
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def _kept(kind: str, config: Any, size: int, tensor_parallel: int) -> Kept:
    if kind == "full_attention":
        return Kept(_token_bytes(config, size, tensor_parallel))
    if kind == "sliding_attention":
        return Kept(_token_bytes(config, size, tensor_parallel), config.sliding_window)
    if kind == "chunked_attention":
        chunk = config.attention_chunk_size
        return Kept(_token_bytes(config, size, tensor_parallel), chunk)
    if kind == "linear_attention" and hasattr(config, "linear_conv_kernel_dim"):
        return Kept(0, None, _gated_delta_net(config, size, tensor_parallel))
    raise UnsupportedModelError(f"what layers of the kind {kind!r} keep isn't known here")


def _token_bytes(config: Any, size: int, tensor_parallel: int) -> int:
    if (rank := getattr(config, "kv_lora_rank", None)) is not None:
        # MLA: one latent for all heads, whole on each device.
        return int(rank + config.qk_rope_head_dim) * size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * max(1, int(heads) // tensor_parallel) * head_size(config) * size


def head_size(config: Any) -> int:
    """Numbers in a key."""
    size: int = getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
    return size


def _gated_delta_net(config: Any, size: int, tensor_parallel: int) -> int:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    convolved = (2 * keys + values) * (config.linear_conv_kernel_dim - 1)
    state = values * config.linear_key_head_dim
    return int((convolved + state) // tensor_parallel * size)
