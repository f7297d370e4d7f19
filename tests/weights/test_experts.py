"""Models whose experts are one tensor in transformers and many in a checkpoint."""

import pytest
import torch
from support import MIB, greedy, large_step, tiny_sizes, trainer_logprobs
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from rollout_server import attach
from rollout_server.errors import UnsupportedModelError
from rollout_server.weights.conversion import views_of
from rollout_server.weights.sources.base import policy_tensors
from rollout_server.weights.wire import TensorSpec
from rollout_server.worker.plan import checkpoint_tensors

PROMPT = list(range(100, 116))


def dimensions(vocabulary):
    return tiny_sizes(
        vocabulary,
        intermediate_size=192,
        num_experts_per_tok=2,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )


def config_of(kind, vocabulary=256):
    if kind == "mixtral":
        return MixtralConfig(**dimensions(vocabulary), num_local_experts=4)
    return Qwen3MoeConfig(
        **dimensions(vocabulary),
        num_experts=4,
        moe_intermediate_size=48,
        head_dim=32,
        tie_word_embeddings=True,
    )


def random_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def in_a_checkpoint(model):
    tensors = policy_tensors(model)
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    whole = ((name, tensor.detach()) for name, tensor in tensors.items())
    return dict(checkpoint_tensors(views_of(model, specs), whole))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_is_views_of_the_live_tensors(kind, tmp_path):
    """By names and values what `save_pretrained` writes, and no byte of it is a copy."""
    from safetensors.torch import load_file

    model = random_model(config_of(kind))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = in_a_checkpoint(model)
    assert found.keys() == saved.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, saved[name]), name
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {t.untyped_storage().data_ptr() for t in found.values()} == storages
    # One that was loaded from live tensors is no other.
    model.save_pretrained(tmp_path / "live", save_original_format=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "live")
    assert in_a_checkpoint(loaded).keys() == saved.keys()


def test_what_a_checkpoint_has_only_computed_is_refused(monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    fused = WeightConverter(
        "self_attn.kv_proj.weight",
        ["self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        operations=[Chunk(dim=0)],
    )
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [fused]
    )
    model = random_model(config_of("mixtral"))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.kv_proj\.weight \(128"):
        in_a_checkpoint(model)


def test_a_model_that_is_not_of_transformers_has_no_conversion():
    linear = torch.nn.Linear(2, 2)
    assert in_a_checkpoint(linear).keys() == {"weight", "bias"}


def assert_on_policy(server, model):
    completion = greedy(server, PROMPT)
    ids = completion.ids
    expected = trainer_logprobs(model, PROMPT, ids)
    assert ids == expected.argmax(-1).tolist()
    chosen = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
    difference = (torch.tensor(completion.logprobs) - chosen).abs().max()
    assert difference < 1e-4
    return float(difference)


def assert_follows(server, model):
    """Three large steps with a sync after each; gives the largest difference of a logprob."""
    worst = [assert_on_policy(server, model)]
    for seed in range(3):
        large_step(model, PROMPT, seed)
        report = server.sync_weights()
        assert report.path in ("plan", "share"), report.reason
        worst.append(assert_on_policy(server, model))
    assert report.verified
    return max(worst)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "colocate"), [("qwen3_moe", "sleep"), ("mixtral", "share")])
def test_experts_follow_the_policy(kind, colocate, tokenizer):
    model = random_model(config_of(kind, len(tokenizer)))
    with attach(
        model,
        tokenizer,
        colocate=colocate,
        kv_cache_memory_bytes=64 * MIB,
        verify_every=1,
        progress=False,
    ) as server:
        print("largest difference", assert_follows(server, model))
        server.sleep()
        server.sync_weights()
        assert_on_policy(server, model)
