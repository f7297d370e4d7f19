"""The recipes' own parts: tasks, settings, the run folder."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainerControl, TrainerState, TrainingArguments

import tasks
from run_folder import RunFolder
from train import TRAINERS, parse_arguments

RECIPES = Path(__file__).parents[1] / "recipes"


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
    with pytest.raises(ValueError, match=r"no task 'sums'.*chain_sum"):
        tasks.make_dataset("sums")


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


def test_the_run_folder(tmp_path):
    """Metrics as JSON lines, a plot and a summary, from a trainer's callbacks."""
    folder, args = (
        RunFolder(str(tmp_path)),
        TrainingArguments(output_dir=str(tmp_path), max_steps=10),
    )
    state, control = TrainerState(max_steps=10, is_world_process_zero=True), TrainerControl()
    folder.on_train_begin(args, state, control)
    for step in range(1, 11):
        state.global_step = step
        logs = {"reward": step / 10, "rollout/policy_version": step}
        if step > 1:  # a key may be missing
            logs["rollout/tokens_per_second"] = 100.0
        folder.on_log(args, state, control, logs=logs)
        folder.on_step_end(args, state, control)
    folder.on_train_end(args, state, control)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines if "reward" in line] == [s / 10 for s in range(1, 11)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    text = json.dumps(summary)
    assert "0.15" in text and "0.95" in text, text  # the first and the last fifth
    assert (tmp_path / "summary.md").stat().st_size > 0
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
