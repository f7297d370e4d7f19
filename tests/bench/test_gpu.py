"""`python -m rollout_server.bench gpu --tiny`: the command itself, as far as a CPU takes it."""

import json
import subprocess
import sys

import pytest
import torch

from rollout_server.bench.gpu.findings import Findings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ONLY = ("share", "cycles")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what was found, the table)."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "rollout_server.bench", "gpu", "--tiny", "--out", str(folder)]
    done = subprocess.run(
        [*command, "--only", ",".join(ONLY)], capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    told = json.loads((folder / "gpu.json").read_text())
    assert told["scale"] == "tiny" and told["machine"]["torch"] == torch.__version__
    table = (folder / "gpu.md").read_text()
    assert table in done.stdout
    assert {p.name for p in folder.iterdir()} == {
        "gpu.json", "gpu.md", *(f"{name}.log" for name in ONLY),
    }  # fmt: skip
    again = subprocess.run(
        [*command, "--only", ",".join(ONLY)], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0 and again.stderr == "", "what is done isn't run again"
    return {name: Findings.of(one) for name, one in told["parts"].items()}, table


def passed(found):
    return {check.what for check in found.checks if check.passed}


def test_one_copy_and_a_restart(run):
    found = run[0]["share"]
    assert found.status == "done" and found.seconds > 0
    assert set(found.skipped) == {"one copy only", "CUDA graphs"}
    assert {
        "the engine has no weights of its own",
        "greedy tokens are the trainer's, at first",
        "step 2: no bytes move",
        "step 2 is seen",
        "another engine answers",
        "greedy tokens are the trainer's, after the restart",
    } <= passed(found)
    assert 0 < found.value("SIGKILL to the next right answer, share") < 60


def test_cycles(run):
    found = run[0]["cycles"]
    assert found.status == "done" and found.value("cycles") == 6
    assert {"each step is seen in the answers", "host memory of both doesn't grow"} <= passed(found)
    assert set(found.skipped) == {"GPU memory of both"}
    assert found.value("seconds of a cycle") > 0


def test_the_table_has_every_figure(run):
    parts, table = run
    assert table.splitlines()[0].startswith("cores ")
    for name, found in parts.items():
        assert f"## {name}: " in table
        for figure in found.figures:
            assert f"| {figure.what} | " in table
