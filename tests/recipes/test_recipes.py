"""The recipes' own parts: tasks, settings, the run folder."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainerControl, TrainerState, TrainingArguments

import tasks
from run_folder import RunFolder
from train import TRAINERS, parse_arguments

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("5", "5", 1.0),
        ("2 + 3 = 5", "5", 1.0),
        ("The answer is 5.", "5", 1.0),
        ("5 or 6", "5", 0.0),
        ("-3", "-3", 1.0),
        ("3", "-3", 0.0),
        ("5-3", "3", 1.0),
        ("50", "5", 0.0),
        ("1,000", "1000", 1.0),
        ("five", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_the_reward_is_the_exact_answer(completion, answer, reward):
    assert tasks.exact_answer([completion], answer=[answer]) == [reward]
    chat = [[{"role": "assistant", "content": completion}]]
    assert tasks.exact_answer(chat, answer=[answer]) == [reward]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_same_seed_gives_the_same_tasks(name):
    first, again = (tasks.make_dataset(name, size=20, seed=3) for _ in range(2))
    assert first.to_list() == again.to_list()
    assert first.to_list() != tasks.make_dataset(name, size=20, seed=30).to_list()
    for row in first:
        assert row["prompt"][-1]["role"] == "user"
        assert tasks.exact_answer([row["answer"]], answer=[row["answer"]]) == [1.0]


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"no task 'sum'.*chain_sum"):
        tasks.make_dataset("sum")


def test_a_task_with_too_few_entries_says_so():
    with pytest.raises(ValueError, match=r"100 entries of 'sums' .*min_digits.* 0 are fit"):
        tasks.make_dataset("sums", size=10, options={"min_digits": 9, "max_digits": 9})


def test_the_sums_of_the_demo_have_one_digit():
    rows = tasks.make_dataset("sums", size=200)
    assert len(rows) == 200
    for row in rows:
        left, right = re.fullmatch(r"What is (\d) \+ (\d)\?", row["prompt"][-1]["content"]).groups()
        assert row["answer"] == str(int(left) + int(right)) and len(row["answer"]) == 1


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_the_launch_settings(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.use_cpu == (path.stem == "cpu")


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "training").glob("*.yaml")), ids=lambda p: p.stem
)
def test_trl_reads_the_training_settings(path, tmp_path):
    known = yaml.safe_load(path.read_text())
    # A GPU's bf16 is refused where there is none.
    override = ["--bf16", "false"] if known.get("bf16") else []
    recipe, config, _ = parse_arguments(["--config", str(path), *override])
    assert type(config) is TRAINERS[recipe.trainer][1]
    assert config.max_steps == known.get("max_steps", config.max_steps)


def record(folder, steps=10):
    """Call the run folder as a trainer does."""
    run, args = RunFolder(folder), TrainingArguments(output_dir=str(folder), max_steps=steps)
    state, control = TrainerState(max_steps=steps, is_world_process_zero=True), TrainerControl()
    run.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        logs = {"reward": step / steps, "rollout/policy_version": step}
        if step > 1:  # a key may be missing
            logs["rollout/tokens_per_second"] = 100.0
        run.on_log(args, state, control, logs=logs)
        run.on_step_end(args, state, control)
    run.on_log(args, state, control, logs={"train_runtime": 1.0})  # the trainer's last
    run.on_train_end(args, state, control)


def test_the_run_folder(tmp_path):
    """Metrics as JSON lines, a plot and a summary, from a trainer's callbacks."""
    record(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines if "reward" in line] == [s / 10 for s in range(1, 11)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 10
    assert summary["reward_first_fifth"] == pytest.approx(0.15)
    assert summary["reward_last_fifth"] == pytest.approx(0.95)
    assert "| reward last fifth | 0.95 |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_elsewhere_a_line_a_step(
    tmp_path, monkeypatch, terminal
):
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal))
    record(tmp_path)
    shown = stream.getvalue()
    if terminal:
        assert shown.count("\n") == 1 and shown.split("\r")[-1].startswith("100%")
        assert "reward=1.000" in shown
        return
    assert "\r" not in shown
    lines = shown.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"step {i}/10" for i in range(1, 11)]
    assert lines[9].endswith(": reward 1.000, tokens/s 100, version 10")
