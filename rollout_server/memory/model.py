"""A model's tensors, by its config alone."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rollout_server.errors import ConfigError, UnsupportedModelError

_PADDING = 64  # vLLM makes the number of rows of these a multiple of it
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight")
# vLLM has these whole on each device of a group: latents of MLA, and what chooses experts.
_WHOLE = ("q_a_proj", "kv_a_proj", "mlp.gate.", "router")
_KEYS_AND_VALUES = ("k_proj", "v_proj")


def read_config(name: str) -> Any:
    """The transformers config of a folder with a config.json, such a file, or a hub's model."""
    import transformers

    where = os.path.dirname(name) or "." if name.endswith(".json") else name
    try:
        return transformers.AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"--model={name!r}: no config of transformers can be read there ({line}); give a "
            "folder with a config.json, that file, or the name of a model on a hub in reach"
        ) from error


def without_weights(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the meta device, every parameter in `dtype`."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    kinds = [k for n in names if (k := getattr(transformers, n, None)) is not None]
    try:
        with torch.device("meta"):
            kind = kinds[0]._from_config if kinds else transformers.AutoModelForCausalLM.from_config
            model: torch.nn.Module = kind(config, dtype=dtype)
    except (ValueError, AttributeError, ImportError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedModelError(
            f"transformers can't build {', '.join(names) or type(config).__name__}: {line}"
        ) from error
    return model.to(dtype)


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """By name, tied ones once."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def engine_bytes(
    shapes: Mapping[str, tuple[int, ...]], element_size: int, tensor_parallel: int, kv_heads: int
) -> int:
    """What the engine has of tensors of these names and shapes, on one device."""
    return element_size * sum(
        _numbers(name, shape, tensor_parallel, kv_heads) for name, shape in shapes.items()
    )


def _numbers(name: str, shape: tuple[int, ...], tensor_parallel: int, kv_heads: int) -> int:
    if name.endswith(_VOCABULARY):
        each = _PADDING * tensor_parallel
        shape = (math.ceil(shape[0] / each) * each, *shape[1:])
    if len(shape) < 2 or any(part in name for part in _WHOLE):
        return math.prod(shape)
    devices = tensor_parallel
    if any(part in name for part in _KEYS_AND_VALUES):
        devices = min(devices, kv_heads)
    return math.ceil(math.prod(shape) / devices)


def largest_block(model: torch.nn.Module, sharded: bool) -> int:
    """Bytes of the largest layer, or of all that is outside of layers: what FSDP gathers at a time;
    0 for a model that isn't to be `sharded`."""
    if not sharded:
        return 0
    layers = [
        sum(_bytes(p) for p in layer.parameters())
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList)
        for layer in module
    ]
    outside = sum(
        _bytes(p) for name, p in model.named_parameters() if not any(c.isdigit() for c in name)
    )
    return max([outside, *layers])


def lora_shapes(model: torch.nn.Module, rank: int) -> Iterable[tuple[int, ...]]:
    """Of an adapter on every linear layer but the head: PEFT's "all-linear"."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            yield (rank, module.in_features)
            yield (module.out_features, rank)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
