"""TRL's trainers with prompts that hold images."""

import pytest
from datasets import Dataset
from support import MIB, trl_settings
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from vision import idefics3, picture

from rollout_server import attach
from rollout_server.errors import NotAvailableError, TrainerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def policy():
    return idefics3()


def rows(count=8):
    """Conversations of one image, and of two."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is this, {i}?"}],
            "images": [picture(i), picture(i + 1, (70, 30))][: 1 + i % 2],
        }
        for i in range(count)
    ]


def reward_variety(completions, **_):
    return [float(len(set(c[0]["content"])) % 7) for c in completions]


@pytest.fixture
def make_trainer(policy, tmp_path):
    model, processor = policy

    def make(trainer=GRPOTrainer, config=GRPOConfig, **options):
        settings = trl_settings(tmp_path, max_steps=3, per_device_train_batch_size=4)
        return trainer(
            model=model,
            args=config(**settings | options),
            train_dataset=Dataset.from_list(rows()),
            reward_funcs=reward_variety,
            processing_class=processor,
        )

    return make


def values(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.parametrize("kind", ["grpo", pytest.param("rloo", marks=pytest.mark.models)])
def test_training_with_images(make_trainer, kind):
    if kind == "grpo":
        trainer = make_trainer(gradient_accumulation_steps=2)
    else:  # without a reference, which TRL would load from a hub
        trainer = make_trainer(RLOOTrainer, RLOOConfig, max_steps=1, beta=0.0)
    begin = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    asked = []
    with attach(trainer, kv_cache_memory_bytes=64 * MIB, progress=False) as server:
        generate = server.generate

        def watched(prompts, fields, **options):
            completions = generate(prompts, fields, **options)
            asked.extend(zip(prompts, options["images"], completions, strict=True))
            return completions

        server.generate = watched
        trainer.train()
        server.verify_weights()
    changed = {n for n, p in trainer.model.named_parameters() if (p != begin[n]).any()}
    assert any("vision" in name for name in changed)
    token = trainer.processing_class.image_token_id
    assert not any(token in completion.ids for _, _, completion in asked)
    assert max(values(trainer, "rollout/logp_difference")) < 1e-4
    if kind == "grpo":
        assert {len(images) for _, images, _ in asked} == {1, 2}
        for which in ("min", "mean", "max"):
            ratios = values(trainer, f"sampling/importance_sampling_ratio/{which}")
            assert len(ratios) == 3 and ratios == pytest.approx([1] * 3, abs=1e-3)


def test_what_isnt_proven_is_refused_at_attach(make_trainer, policy):
    trainer = make_trainer()
    trainer.tools = [print]
    with pytest.raises(NotAvailableError, match=r"'images'.*tools or environments"):
        attach(trainer)
    trainer.tools = []
    with pytest.raises(NotAvailableError, match=r"rollout=: train_dataset holds images"):
        attach(trainer, rollout=lambda session, example: 1.0)
    trainer.processing_class = policy[1].tokenizer
    with pytest.raises(TrainerError, match=r"'images'.*processing_class is a"):
        attach(trainer)
