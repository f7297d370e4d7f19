"""The KV cache as reckoned, beside vLLM's own code: its models' layers say what they keep, and its
scheduler's code how much a request needs. No engine is started, and nothing has weights."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers as T

from rollout_server.errors import UnsupportedModelError
from rollout_server.memory.kv_cache import kv_cache_of

LENGTH, BATCHED = 4096, 2048
SMALL = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 512}
ATTENTION = {"num_attention_heads": 8, "head_dim": 64, "max_position_embeddings": LENGTH}
CONFIGS = {
    # First: vLLM makes its group of experts for a model that has some.
    "Qwen3MoeForCausalLM": T.Qwen3MoeConfig(
        num_hidden_layers=2,
        num_key_value_heads=1,
        num_experts=4,
        moe_intermediate_size=64,
        **SMALL,
        **ATTENTION,
    ),
    "LlamaForCausalLM": T.LlamaConfig(
        num_hidden_layers=3, num_key_value_heads=2, **SMALL, **ATTENTION
    ),
    "Qwen3ForCausalLM": T.Qwen3Config(
        num_hidden_layers=2, num_key_value_heads=4, **SMALL, **ATTENTION
    ),
    "Gemma3ForCausalLM": T.Gemma3TextConfig(
        num_hidden_layers=14, num_key_value_heads=2, sliding_window=512, **SMALL, **ATTENTION
    ),
    "MistralForCausalLM": T.MistralConfig(
        num_hidden_layers=2, num_key_value_heads=2, sliding_window=1024, **SMALL, **ATTENTION
    ),
    "DeepseekV2ForCausalLM": T.DeepseekV2Config(
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        q_lora_rank=None,
        first_k_dense_replace=2,
        **SMALL,
    ),
}
# Prints, by folder: bytes of the model's parameters, bytes that its layers keep of a token, and
# bytes of blocks for a request of the longest length.
VLLM = """
import json, math, os, sys, torch
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.v1.core import kv_cache_utils

told, begun = {}, False
for folder in sys.argv[3:]:
    config = EngineArgs(
        model=folder, skip_tokenizer_init=True, enforce_eager=True, load_format="dummy",
        kv_cache_memory_bytes=1 << 28, max_model_len=int(sys.argv[1]),
        max_num_batched_tokens=int(sys.argv[2]), max_num_seqs=8, block_size=16,
        async_scheduling=False, disable_hybrid_kv_cache_manager=False,
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # as an engine finds; no size depends on it
    with set_current_vllm_config(config):
        if not begun:
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
            begun = True
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"):
            model = initialize_model(config)
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    token = sum(spec.page_size_bytes / spec.block_size for spec in specs.values())
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    made = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, 1 << 28)
    each = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, made)
    told[os.path.basename(folder)] = {
        "weights": sum(p.nbytes for p in model.parameters()), "token": token,
        "request": (1 << 28) / each,
    }
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def vllms(tmp_path_factory):
    """What vLLM says of each config, in one process."""
    folders = []
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("configs") / name
        config.architectures, config.dtype = [name], torch.bfloat16
        config.save_pretrained(folder)
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", VLLM, str(LENGTH), str(BATCHED), *folders],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_as_vllm_has_it(name, vllms):
    reckoned = kv_cache_of(CONFIGS[name], 2, 1, BATCHED)
    assert reckoned.token_bytes == vllms[name]["token"]
    assert reckoned.request_bytes(LENGTH) == pytest.approx(vllms[name]["request"], rel=0.01)


def test_a_window_bounds_what_a_request_needs():
    names = "Gemma3ForCausalLM", "Qwen3ForCausalLM"
    hybrid, full = (kv_cache_of(CONFIGS[name], 2, 1, BATCHED) for name in names)
    assert hybrid.request_bytes(32 * LENGTH) < 0.4 * hybrid.token_bytes * 32 * LENGTH
    assert full.request_bytes(32 * LENGTH) == full.token_bytes * 32 * LENGTH
    assert full.tokens_in(full.token_bytes * 10_000, 32) == 10_000


def test_heads_are_divided_and_latents_are_not():
    def token_bytes(name, devices):
        return kv_cache_of(CONFIGS[name], 2, devices, BATCHED).token_bytes

    assert token_bytes("Qwen3ForCausalLM", 2) * 2 == token_bytes("Qwen3ForCausalLM", 1)
    assert token_bytes("Qwen3MoeForCausalLM", 2) == token_bytes("Qwen3MoeForCausalLM", 1)
    assert token_bytes("DeepseekV2ForCausalLM", 2) == token_bytes("DeepseekV2ForCausalLM", 1)


def test_a_state_is_for_a_request_and_not_for_a_token():
    config = T.Qwen3NextConfig(num_hidden_layers=8, num_key_value_heads=2, head_dim=256)
    cache = kv_cache_of(config, 2, 1, BATCHED)
    assert cache.token_bytes == 2 * 2 * 2 * 256 * 2  # two layers of eight have attention
    keys, values = 16 * 128, 32 * 128
    (state,) = [kept.state_bytes for kept, _ in cache.layers if kept.state_bytes]
    assert state == 2 * ((2 * keys + values) * (4 - 1) + values * 128)


def test_unknown_layers_are_refused_by_name():
    config = T.LlamaConfig(num_hidden_layers=1)
    config.layer_types = ["mamba"]
    with pytest.raises(UnsupportedModelError, match="'mamba'"):
        kv_cache_of(config, 2, 1, BATCHED)


def test_whole_blocks():
    cache = kv_cache_of(CONFIGS["LlamaForCausalLM"], 2, 1, BATCHED)
    assert cache.request_bytes(17) == 32 * cache.token_bytes
    assert math.isclose(cache.request_bytes(LENGTH), LENGTH * cache.token_bytes)
