"""The agent's recipe: its tool, and a step of training with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import agent

RECIPE = Path(agent.__file__)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("<calc>17 + 25</calc>", (17, "+", 25)),
        ("So: <calc>3*4</calc> <calc>1 + 1</calc>", (3, "*", 4)),
        ("<calc>17 + 25", None),
        ("<calc 17 + 25</calc>", None),
        ("<calc>17 ** 25</calc>", None),
        ("<calc>99999 - 1</calc>", None),
        ("17 + 25 = 42", None),
        ("", None),
    ],
)
def test_the_first_call_is_found(text, call):
    assert agent.find_call(text) == call


@pytest.mark.parametrize(
    ("call", "result"), [((2, "+", 3), 5), ((2, "-", 3), -1), ((2, "*", 3), 6)]
)
def test_the_calculator(call, result):
    assert agent.calculate(*call) == result


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_of_training(tmp_path):
    """As a newcomer starts it: two turns for each rollout, none fails, the parts are logged."""
    command = [sys.executable, str(RECIPE), "--steps", "1", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (step,) = [log for log in map(json.loads, lines) if "reward" in log]
    assert step["rollout/turns"] == 2 and step["rollout/failed"] == 0
    parts = sum(worth * step[f"agent/{part}"] for part, worth in agent.WORTH.items())
    assert step["reward"] == pytest.approx(parts)
    # The tokens of both turns are trained on, with the probabilities that they were sampled with.
    assert step["rollout/logp_difference"] < 1e-3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward_first_5"] == summary["reward_last_5"] == pytest.approx(step["reward"])
    assert summary["turns"] == 2 and summary["failed"] == 0
    assert "reward first 5" in done.stdout
