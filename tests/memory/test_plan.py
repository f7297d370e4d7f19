"""The plan: well-known shapes by their configs' formulae, phases, and what is suggested."""

import dataclasses
import re

import pytest
import transformers as T

from rollout_server.memory.kv_cache import kv_cache_of
from rollout_server.memory.model import engine_bytes, parameter_shapes, without_weights
from rollout_server.memory.plan import Demand, plan
from rollout_server.memory.sizes import GIB, MIB, size_of

import torch  # isort: skip


def dense(c):
    """Numbers of a decoder of q, k, v, o, gate, up and down, with two norms a layer."""
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return c.hidden_size * (2 * heads + 2 * kv) + 3 * c.hidden_size * c.intermediate_size


def llama(c):
    layer = dense(c) + 2 * c.hidden_size
    return 2 * c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size


def qwen3(c):
    layer = dense(c) + 2 * c.hidden_size + 2 * c.head_dim  # norms of queries and keys
    return c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size


def qwen3_moe(c):
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * heads + 2 * kv) + 2 * c.head_dim
    experts = c.num_experts * (3 * c.hidden_size * c.moe_intermediate_size + c.hidden_size)
    layer = attention + experts + 2 * c.hidden_size
    return 2 * c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size


GOLDEN = {
    "Llama-3-8B": (
        llama,
        "LlamaForCausalLM",
        8.03,
        T.LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=8192,
        ),
    ),
    "Qwen3-4B": (
        qwen3,
        "Qwen3ForCausalLM",
        4.02,
        T.Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen3-30B-A3B": (
        qwen3_moe,
        "Qwen3MoeForCausalLM",
        30.5,
        T.Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_well_known_shapes(name):
    formula, architecture, billions, config = GOLDEN[name]
    config.architectures = [architecture]
    model = without_weights(config, torch.bfloat16)
    numbers = formula(config)
    assert numbers / 1e9 == pytest.approx(billions, rel=0.002)
    assert sum(p.nbytes for p in model.parameters()) == 2 * numbers
    heads = config.num_key_value_heads
    assert engine_bytes(parameter_shapes(model), 2, 1, heads) == 2 * numbers
    halves = engine_bytes(parameter_shapes(model), 2, 2, heads)
    assert numbers <= halves < 1.03 * numbers, "norms, and what chooses experts, are whole"
    cache = kv_cache_of(config, 2, 1, 8192)
    assert cache.token_bytes == config.num_hidden_layers * 2 * heads * config.head_dim * 2


CACHE = kv_cache_of(GOLDEN["Qwen3-4B"][3], 2, 1, 8192)
DEMAND = Demand(
    total=80 * GIB,
    weights=8 * GIB,
    gradients=8 * GIB,
    optimizer=16 * GIB,
    casts=0,
    gathered=0,
    others=GIB,
    engine_weights=8 * GIB,
    adapter=0,
    activations=4 * GIB,
    graphs=GIB,
    kv_cache=CACHE,
    kv_bytes=None,
    utilization=None,
    longest=2048,
    at_most=10_000,
    bucket=0,
    colocate="sleep",
    offload=False,
    shareable=True,
    movable=True,
)


def made(**changes):
    return plan(dataclasses.replace(DEMAND, **changes))


def rows(found):
    return {row.name: (row.rollout, row.sync, row.training) for row in found.rows}


def test_phases():
    found = made()
    assert rows(found)["trainer: gradients"] == (0, 0, 8 * GIB)
    assert rows(found)["trainer: optimizer state"] == (16 * GIB,) * 3
    assert rows(found)["engine: weights"] == (8 * GIB, 8 * GIB, 0)
    assert found.fits and found.left["rollout"] == pytest.approx(0.1 * found.most, abs=2)
    offloaded = made(offload=True)
    assert rows(offloaded)["trainer: optimizer state"] == (0, 0, 16 * GIB)
    assert offloaded.most - found.most == 16 * GIB
    shared = made(colocate="share")
    assert "engine: weights" not in rows(shared) and shared.most - found.most == 8 * GIB
    buckets = made(bucket=GIB)
    assert rows(buckets)["sync: two buckets"] == (0, 2 * GIB, 0)
    assert found.most - buckets.most == 2 * GIB
    resident = made(colocate="resident")
    assert rows(resident)["engine: KV cache"] == (resident.kv_bytes,) * 3
    assert found.most - resident.most == 8 * GIB, "gradients are there at the same time"


def test_the_kv_caches_size():
    assert made(kv_bytes=GIB).kv_bytes == GIB
    by_share = made(utilization=0.3)
    own = sum(row.rollout for row in by_share.rows if row.name.startswith("engine"))
    assert own == pytest.approx(24 * GIB, abs=2)
    assert made(utilization=0.3, colocate="share").kv_bytes == by_share.kv_bytes
    assert made(at_most=3).kv_bytes == 3 * CACHE.request_bytes(2048), "more can't be used"
    tight = made(total=DEMAND.total - made().most + made().least + GIB // 4)
    assert tight.fits and tight.kv_bytes >= tight.least


def largest(found):
    """Whether a KV cache of `most` fits, and one of a MiB more doesn't."""
    at = dataclasses.replace(found.demand, kv_bytes=found.most)
    over = dataclasses.replace(found.demand, kv_bytes=found.most + MIB)
    return plan(at).fits and not plan(over).fits


@pytest.mark.parametrize("colocate", ["sleep", "share", "resident"])
@pytest.mark.parametrize("bucket", [0, GIB])
def test_the_largest_that_fits(colocate, bucket):
    assert largest(made(colocate=colocate, bucket=bucket))


# Memory, options, and what is to be suggested.
CASES = [
    (80 * GIB, {"kv_bytes": 60 * GIB}, "kv_cache_memory_bytes"),
    (80 * GIB, {"utilization": 0.1}, "kv_cache_memory_bytes"),
    (38 * GIB, {}, "offload_optimizer=True"),
    (38 * GIB, {"movable": False}, 'colocate="share"'),
    (44 * GIB, {"colocate": "resident"}, 'colocate="sleep"'),
    (40 * GIB, {"bucket": 4 * GIB, "optimizer": 15 * GIB - 100 * MIB}, "offload_optimizer=True"),
    (
        41 * GIB,
        {"bucket": 4 * GIB, "movable": False, "shareable": False},
        "sync_bucket_bytes=67108864",
    ),
    (40 * GIB, {"longest": 60_000, "movable": False, "optimizer": 14 * GIB}, 'colocate="share"'),
    (
        40 * GIB,
        {"longest": 60_000, "movable": False, "optimizer": 14 * GIB, "shareable": False},
        "max_model_len=15000",
    ),
    (30 * GIB, {}, None),
]
FIELDS = {
    "kv_cache_memory_bytes": "kv_bytes",
    "offload_optimizer": "offload",
    "colocate": "colocate",
    "sync_bucket_bytes": "bucket",
    "max_model_len": "longest",
}


def applied(demand, text):
    """The demand with the options that a verdict names."""
    for name, value in re.findall(r"(\w+)=(\"\w+\"|True|\d+)", text):
        value = {"True": True}.get(value, int(value) if value.isdigit() else value.strip('"'))
        demand = dataclasses.replace(demand, **{FIELDS[name]: value})
    return demand


@pytest.mark.parametrize(("total", "changes", "option"), CASES)
def test_what_is_suggested_makes_it_fit(total, changes, option):
    bad = made(total=total, **changes)
    assert not bad.fits
    told = re.search(r"\. ([^.]*) would make it fit", bad.verdict())
    if option is None:
        assert "No option" in bad.verdict() and "FSDP" in bad.verdict()
        return
    assert told[1].startswith(option), bad.verdict()
    assert plan(applied(bad.demand, told[1])).fits


def test_the_table_adds_up():
    found = made(bucket=512 * MIB)
    for name, left in found.left.items():
        assert sum(getattr(row, name) for row in found.rows) + left == 80 * GIB
    lines = found.table().splitlines()
    assert len(lines) == len(found.rows) + 2 and len({len(line) for line in lines}) == 1
    assert "left of 80.0 GiB" in lines[-1]


def test_sizes():
    assert size_of("--gpu", "80GiB") == 80 * GIB == size_of("--gpu", "80 gib")
    assert size_of("--gpu", "24GB") == 24 * 10**9 and size_of("--gpu", "1.5MiB") == 3 * MIB // 2
