"""Agents as the rollouts of TRL's GRPO."""

import threading
import time

import pytest
import torch
from datasets import Dataset
from rollout_server.integrations.trl import session_reward
from support import MIB, trl_settings
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rollout_server import attach
from rollout_server.errors import ConfigError, TrainerError

pytestmark = pytest.mark.slow


@pytest.fixture
def trainer(tiny_folder, tokenizer, tmp_path):
    settings = trl_settings(tmp_path, max_steps=2, per_device_train_batch_size=8)
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": f"Say {i}", "number": i} for i in range(8)]),
        reward_funcs=session_reward,
        processing_class=tokenizer,
    )


def talk(client, *texts):
    """A conversation; its answers."""
    messages, answers = [], []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answer = client.chat.completions.create(
            model="policy", messages=messages, extra_body={"ignore_eos": True}
        )
        answers.append(answer.choices[0].message.content)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.core
def test_agents_are_the_rollouts(trainer):
    seen, running, most = [], set(), [0]
    lock = threading.Lock()

    def agent(session, example):
        with lock:
            running.add(session.id)
            most[0] = max(most[0], len(running))
            number = len(seen)
            seen.append(example["number"])
        try:
            with session.openai() as client:
                talk(client, example["prompt"], "And now?")
            if number == 0:
                raise KeyError("an agent's own mistake")
            if number == 1:
                with lock:
                    running.discard(session.id)  # a thread can't be stopped, only given up
                time.sleep(60)
            session.set_reward(components={"turns": 2})
            return float(example["number"] % 3)
        finally:
            with lock:
                running.discard(session.id)

    batches = []
    with attach(
        trainer,
        rollout=agent,
        rollout_concurrency=3,
        rollout_timeout=15,
        progress=False,
        kv_cache_memory_bytes=64 * MIB,
    ) as server:
        score = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: (
            batches.append((inputs, score(inputs))) or batches[-1][1]
        )
        trainer.train()
        assert server.state == "awake" and server.policy_version == 3
    assert trainer.rollout_func is None
    assert len(seen) == 16 and most[0] == 3
    logs = [log for log in trainer.state.log_history if "rollout/turns" in log]
    assert logs[0]["rollout/failed"] == 2 / 8 and logs[1]["rollout/failed"] == 0
    assert all(
        log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.01) for log in logs
    )
    assert all(log["rollout/logp_difference"] < 1e-3 for log in logs)
    failed = 0
    for inputs, batch in batches:
        assert batch["completion_ids"].shape[0] == 8
        for example, mask in zip(inputs, batch["tool_mask"], strict=True):
            if example["reward"] is None:
                failed += 1
                assert mask[0] == 0, "a failed rollout is trained on"
            else:
                # Each prompt has its own agent's row.
                assert example["reward"] == example["number"] % 3
                assert f"Say {example['number']}" in example["messages"][0]["content"]
                assert example["components"] == {"turns": 2.0}
                assert int(mask.sum()) >= 16
    assert failed == 2


def test_an_agent_that_never_works_is_told_at_once(trainer):
    async def agent(session, example):
        raise KeyError("no such tool")

    options = {"progress": False, "kv_cache_memory_bytes": 64 * MIB}
    with attach(trainer, rollout=agent, **options):
        with pytest.raises(TrainerError, match=r"first 8 rollouts failed.*no such tool"):
            trainer.train()
        # One without mistakes takes its place.

        async def other(session, example):
            asked = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}]}
            async with session.async_openai() as client:
                answer = await client.chat.completions.create(**asked)
                said = {"role": "assistant", "content": answer.choices[0].message.content}
                asked["messages"] += [said, {"role": "user", "content": example["prompt"]}]
                grammar = {"structured_outputs": {"regex": "[0-9]{9}"}}
                await client.chat.completions.create(**asked, extra_body=grammar)
            return 1.0

        trainer.rollout_func.agent = other
        trainer.train()
    log = next(log for log in trainer.state.log_history if "rollout/turns" in log)
    assert log["rollout/turns"] == 2 and log["reward"] == 1.0
    # The trainer computes what the model gives without the grammar.
    assert log["rollout/logp_difference"] < 1e-3 and log["rollout/logp_difference_masked"] > 1


def test_what_is_no_agent_is_refused(trainer):
    with pytest.raises(ConfigError, match=r"rollout=5: give a function"):
        attach(trainer, rollout=5)
    with pytest.raises(ConfigError, match=r"two arguments, \(session, example\)"):
        attach(trainer, rollout=lambda session: 1.0)
    with pytest.raises(ConfigError, match=r"server\.session\(\)"):
        attach(trainer.model, trainer.processing_class, rollout=lambda s, e: 1.0)
    trainer.rollout_func = lambda prompts, trainer: {}
    with pytest.raises(TrainerError, match="rollouts of its own"):
        attach(trainer, rollout=lambda s, e: 1.0)
