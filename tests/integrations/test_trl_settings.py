"""What TRL's users switch on, with the real trainer and engine: each in as few runs as can be."""

import itertools
import threading
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from support import MIB, trainer_logprobs, trl_settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rollout_server import attach
from rollout_server.errors import PromptTooLongError

pytestmark = pytest.mark.slow
QUICK = {"kv_cache_memory_bytes": 64 * MIB, "progress": False}
PLEASE = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def collect(trainer):
    """A list of batches that grows with each rollout."""
    batches, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (
        batches.append(score(inputs)) or batches[-1]
    )
    return batches


def of_row(batch, row):
    """(prompt ids, completion ids) without padding."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
    return prompt, batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()


def cut_off_by_hand(trainer, batch, temperature, top_k, top_p):
    """Mean per token of the mass that vLLM's top_k, and then top_p, take from the policy."""
    cut = []
    for row in range(len(batch["prompt_ids"])):
        prompt, ids = of_row(batch, row)
        logits = trainer_logprobs(trainer.model, prompt, ids)
        for at in (logits / temperature).softmax(-1):
            best = at.sort(descending=True).values[:top_k]
            share = best / best.sum()
            kept = best[share.cumsum(0) - share < top_p]
            cut.append(1 - kept.sum().item())
    return sum(cut) / len(cut)


def test_failures_of_training_leave_an_engine_that_serves(tiny_folder, tokenizer, tmp_path):
    """And evaluation, training once more and resuming from a checkpoint go on from there."""
    failing = []  # after how many calls of the reward function, and with what it is to fail
    asking = threading.Event()

    def reward(completions, **_):
        asking.set()
        if failing and failing[0][0] == 0:
            raise failing.pop()[1]
        if failing:
            failing[0] = (failing[0][0] - 1, failing[0][1])
        return [float(len(set(text)) % 7) for text in completions]

    settings = trl_settings(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        temperature=0.8,
        top_k=40,
        top_p=0.9,
        vllm_importance_sampling_mode="token_truncate",
        generation_kwargs={"ignore_eos": True},
    )
    data = Dataset.from_list([{"prompt": f"Say {i} times {i}"} for i in range(16)])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        args=GRPOConfig(**settings),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        reward_funcs=reward,
        processing_class=tokenizer,
    )
    with pytest.warns(UserWarning, match=r"top_p=0\.9, top_k=40: .*rollout/truncated_mass"):
        server = attach(trainer, **QUICK)
    with server, server.openai() as client:
        cut, score = [], trainer._generate_and_score_completions

        def score_by_hand(inputs):
            batch = score(inputs)
            cut.append(cut_off_by_hand(trainer, batch, 0.8, 40, 0.9))
            return batch

        trainer._generate_and_score_completions = score_by_hand

        def raises(error, work, after=0):
            failing.append((after, error))
            with pytest.raises(type(error), match="on purpose"):
                work()
            assert not failing and server.state == "awake"
            server.verify_weights()
            assert client.chat.completions.create(**PLEASE, timeout=30).usage.completion_tokens == 2

        # The engine sleeps when the reward of the second step is asked for.
        raises(ValueError("on purpose"), trainer.train, after=1)
        assert (tmp_path / "checkpoint-1").is_dir()
        raises(KeyboardInterrupt("on purpose"), trainer.evaluate)
        # A client that asks while the engine sleeps in an evaluation is answered at its end.
        answers = []
        asking.clear()

        def ask():
            asking.wait(60)
            answers.append(client.chat.completions.create(**PLEASE, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        assert "eval_reward" in trainer.evaluate()
        thread.join(60)
        assert len(answers) == 1 and server.state == "awake"
        raises(KeyboardInterrupt("on purpose"), trainer.train)
        # Weights set by hand between two calls are the ones that are evaluated.
        with torch.no_grad():
            trainer.model.model.norm.weight.mul_(1.5)
        trainer.evaluate()
        logged = trainer.state.log_history[-1]["eval_rollout/truncated_mass"]
        assert logged == pytest.approx(sum(cut[-4:]) / 4, abs=1e-4)
        so_far = len(cut)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert len(cut) == so_far + 2  # rollouts, of the steps after the first
        assert trainer.state.global_step == 3 and server.state == "awake"
        server.verify_weights()
    logs = [log for log in trainer.state.log_history if "rollout/truncated_mass" in log]
    assert [log["step"] for log in logs] == [1, 2, 3]
    # What was logged of the last two rollouts is what the model's own logits give.
    for log, by_hand in zip(logs[-2:], cut[-2:], strict=True):
        assert by_hand > 0.02
        assert log["rollout/truncated_mass"] == pytest.approx(by_hand, abs=1e-4)
        ratio = log["sampling/importance_sampling_ratio/mean"]
        assert ratio == pytest.approx(1 - by_hand, abs=1e-3)


def shout(text: str) -> str:
    """
    Say it loudly.

    Args:
        text: What to say.

    Returns:
        The same in capitals.
    """
    return text.upper()


class Library:
    """An environment of TRL's: its methods are tools. Half of them tell too much."""

    made = itertools.count()

    def __init__(self):
        self.verbose = next(self.made) % 2 == 1

    def reset(self, **_):
        return " Use the library."

    def look_up(self, text: str) -> str:
        """
        Look something up.

        Args:
            text: What to look up.

        Returns:
            What is written there.
        """
        if self.verbose:
            return "word " * 250  # more than the engine's context has room for
        if text == "d":
            raise KeyError("no such entry")
        return "short"


CALL = r'<tool_call>\n\{"name": "(look_up|shout)", "arguments": \{"text": "[a-d]"\}\}\n</tool_call>'


def test_tools_and_environments(tiny_folder, tmp_path):
    """A tool's result that the engine's context has no room for ends its conversation, not the run;
    completions that were cut short are masked; the chat template gets its arguments."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text()
    settings = trl_settings(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=500,
        max_tool_calling_iterations=1,
        mask_truncated_completions=True,
        chat_template_kwargs={"enable_thinking": False},
        generation_kwargs={"structured_outputs": {"regex": CALL}},
    )
    prompts = [{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(8)]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(prompts),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        processing_class=tokenizer,
        tools=[shout],
        environment_factory=Library,
    )
    with attach(trainer, max_model_len=512, **QUICK) as server:
        batches = collect(trainer)
        trainer.train()
        assert server.state == "awake"
        server.verify_weights()
        logs = [log for log in trainer.state.log_history if "tools/call_frequency" in log]
        # The data set's own prompt that is too long is told by name, and can be left out.
        trainer.train_dataset = Dataset.from_list(
            [{"prompt": [{"role": "user", "content": "word " * 600}]}] * 2
        )
        with pytest.raises(PromptTooLongError, match=r"context length is 512.*max_model_len"):
            trainer.train()
        assert server.state == "awake"
    assert len(logs) == 2 and all(log["tools/call_frequency"] > 0 for log in logs)
    too_long = trained = 0
    for batch in batches:
        assert batch["old_per_token_logps"].isfinite().all()
        for row in range(8):
            prompt, ids = of_row(batch, row)
            assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
            assert "Use the library." in tokenizer.decode(prompt)
            ours = batch["tool_mask"][row].bool() & batch["completion_mask"][row].bool()
            whole = batch["completion_ids"][row]
            whole = whole[
                : len(whole) - int((whole.flip(0) == tokenizer.pad_token_id).cumprod(0).sum())
            ]
            if not ids:  # cut short: by the engine's context
                assert len(prompt) + len(whole) >= 480 and not ours.any()
                too_long += 1
                continue
            trained += 1
            said = tokenizer.decode(batch["completion_ids"][row][ours])
            told = tokenizer.decode(batch["completion_ids"][row][~ours])
            assert "tool_response" not in said and ("tool_call>" not in told)
            # The engine's probabilities of what it sampled, and nothing for what it was told.
            sampled = batch["sampling_per_token_logps"][row]
            assert (sampled[~ours] == 0).all() and (sampled[ours] <= 0).all()
    assert too_long and trained
