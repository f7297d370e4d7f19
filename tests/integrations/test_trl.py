"""TRL's trainers with an attached server."""

import pytest
import torch
from peft import LoraConfig
from support import MIB
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rollout_server import attach
from rollout_server.errors import AlreadyAttachedError

pytestmark = pytest.mark.slow
QUICK = {"kv_cache_memory_bytes": 64 * MIB, "progress": False}


def values(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.core
@pytest.mark.parametrize(
    ("trainer", "config", "options"),
    [
        # Two optimizer steps per rollout, accumulation, evaluation.
        (
            GRPOTrainer,
            GRPOConfig,
            dict(
                num_iterations=2,
                gradient_accumulation_steps=2,
                max_steps=4,
                eval_strategy="steps",
                eval_steps=2,
                per_device_eval_batch_size=4,
                temperature=0.9,
            ),
        ),
        # Generates while it trains.
        (RLOOTrainer, RLOOConfig, {}),
    ],
    ids=["grpo", "rloo-resident"],
)
def test_training(make_trainer, trainer, config, options):
    trainer = make_trainer(trainer, config, evaluate="eval_strategy" in options, **options)
    begin = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    states = []
    sleeps = config is GRPOConfig
    with attach(trainer, colocate="sleep" if sleeps else "resident", **QUICK) as server:
        with pytest.raises(AlreadyAttachedError):
            attach(trainer)
        loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: (states.append(str(server.state)), loss(*a, **k))[1]
        trainer.train()
        assert any((p != begin[n]).any() for n, p in trainer.model.named_parameters())
        # Asleep while the trainer computes, awake with the trained weights afterwards.
        assert set(states) == {"asleep" if sleeps else "awake"}
        assert server.state == "awake"
        server.verify_weights()
        assert server.policy_version >= 2
        for key in (
            "tokens_per_second",
            "policy_version",
            "seconds_sync",
            "seconds_wake",
            "kv_cache_usage",
            "logp_difference",
        ):
            assert values(trainer, f"rollout/{key}"), key
        assert bool(values(trainer, "rollout/seconds_sleep")) == sleeps
        assert max(values(trainer, "rollout/logp_difference")) < 1e-3
        name = 'rollout_server_logprob_mean_absolute_difference_nats{sampled="free"}'
        logged = values(trainer, "rollout/logp_difference")
        assert server.metrics()[name] == pytest.approx(logged[-1], abs=1e-5)
        assert min(values(trainer, "rollout/kv_cache_usage")) > 0
        versions = values(trainer, "rollout/policy_version")
        assert versions == sorted(versions) and versions[-1] > versions[0]
        if sleeps:
            for ratio in values(trainer, "sampling/importance_sampling_ratio/mean"):
                assert 0.95 < ratio < 1.05
            assert values(trainer, "eval_rollout/tokens_per_second")
            # Evaluated twice without a step between, from an engine that was asleep.
            server.sleep()
            versions = [server.policy_version]
            for _ in range(2):
                evaluated = len(values(trainer, "eval_reward"))
                trainer.evaluate()  # which returns it since TRL 1.5
                assert len(values(trainer, "eval_reward")) == evaluated + 1
                assert server.state == "awake"
                versions.append(server.policy_version)
            assert versions[0] < versions[1] < versions[2]
    # The trainer generates by itself again.
    assert trainer.use_vllm is False
    assert "_generate" not in vars(trainer) and not hasattr(trainer, "vllm_generation")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_in_shared_memory(make_trainer, lora):
    """Nothing is sent, or the adapter alone; the engine rests while the trainer computes."""
    trainer = make_trainer(peft=LoraConfig(target_modules=["q_proj", "v_proj"]) if lora else None)
    begin = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    reports, states = [], []
    options = {"colocate": "share", "peft": "adapter", "offload_optimizer": True}
    with attach(trainer, **options, **QUICK) as server:
        sync, loss = server.sync_weights, trainer.compute_loss
        server.sync_weights = lambda: (reports.append(sync()), reports[-1])[1]
        trainer.compute_loss = lambda *a, **k: (states.append(str(server.state)), loss(*a, **k))[1]
        trainer.train()
        server.verify_weights()
        assert {n for n, p in trainer.model.named_parameters() if (p != begin[n]).any()} == {
            n for n, p in trainer.model.named_parameters() if p.requires_grad
        }
        assert set(states) == {"asleep"} and len(reports) == 4
        sent = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
        assert {r.bytes for r in reports} == {sent if lora else 0}
        assert max(values(trainer, "rollout/logp_difference")) < 1e-3


@pytest.mark.core
def test_rollouts_are_those_the_engine_sampled(make_trainer):
    """Order, repetition, sampling fields and log-probabilities, by the seam itself."""
    trainer = make_trainer(
        max_completion_length=6,
        generation_kwargs={"min_tokens": 6, "stop": None},
        vllm_structured_outputs_regex="[ab]{1,40}",
    )
    with attach(trainer, **QUICK) as server:
        prompts = [[7, 8, 9]] * 2 + [[10, 11]] * 2
        out = trainer.vllm_generation.generate(prompts, None, 2)
        prompt_ids, completion_ids, logprobs, logprob_ids = out
        assert prompt_ids == prompts
        assert {len(ids) for ids in completion_ids} == {6}
        for ids, probabilities, tokens in zip(completion_ids, logprobs, logprob_ids, strict=True):
            assert [[i] for i in ids] == tokens
            assert [len(p) for p in probabilities] == [1] * len(ids)
            text = trainer.processing_class.decode(ids)
            assert set(text) <= {"a", "b"}, text
        # Of tokens sampled under a grammar the trainer knows nothing: they are logged apart.
        batch = {
            "completion_mask": torch.ones(4, 6, dtype=torch.long),
            "old_per_token_logps": torch.zeros(4, 6),
            "sampling_per_token_logps": torch.tensor(logprobs)[..., 0],
        }
        trainer.model.train()
        trainer.vllm_generation.log_difference(batch)
        logged = trainer._metrics["train"]
        (difference,) = logged["rollout/logp_difference_masked"]
        assert difference == pytest.approx(-batch["sampling_per_token_logps"].mean().item())
        assert difference > 0 and not logged["rollout/logp_difference"]
        # Asked while asleep, without a new step: woken up again.
        server.sleep()
        assert trainer.vllm_generation.generate(prompts[:1], None, 1)[0] == prompts[:1]
        # An agent's request that leaves fields out is sampled as the trainer does.
        answer = server.openai().chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"ignore_eos": True},
        )
        assert answer.usage.completion_tokens == 6
        longest = server.max_model_len
        for prompt, echo, count in (
            ([7], False, 6),
            ([7], True, 6),
            ([7] * (longest - 3), False, 3),
        ):
            answer = server.openai().completions.create(
                model="policy", prompt=prompt, echo=echo, extra_body={"ignore_eos": True}
            )
            assert answer.usage.completion_tokens == count
