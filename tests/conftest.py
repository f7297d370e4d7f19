"""Shared models and engines: an engine costs 20 to 50 s on two cores, so most tests share one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch
import torch.distributed as dist
from support import MIB, tiny_sizes
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rollout_server import attach
from smollm2 import model_folder


@pytest.fixture(scope="session")
def smollm2():
    """A folder with SmolLM2-135M-Instruct."""
    return str(model_folder())


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    """SmolLM2's, for the tiny models too: a real vocabulary and a real chat template."""
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory):
    """A folder with a random two-layer Qwen2, embeddings tied."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **tiny_sizes(len(tokenizer), max_position_embeddings=1024),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(tiny_folder):
    """A fresh tiny model."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture
def process_group():
    """A process group of this process alone, which DDP needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def shared_model(tiny_folder):
    """The policy of `shared_server`; tests that change it leave it changed."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def shared_server(shared_model, tokenizer):
    """One engine for the tests that need nothing special of theirs; use `server`."""
    with attach(
        shared_model,
        tokenizer,
        kv_cache_memory_bytes=256 * MIB,
        hold_timeout=30,
        check_finite="always",
        progress=False,
    ) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """The shared server, awake and holding the policy's weights before and after the test."""
    shared_server.wake()
    yield shared_server
    if shared_server.state in ("awake", "asleep"):
        shared_server.sync_weights()
