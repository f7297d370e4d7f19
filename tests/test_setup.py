"""scripts/setup.sh: torch's CPU build comes from PyTorch's index whatever way pip fails first."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = """#!/usr/bin/env bash
echo "$*" >> calls
case "$*" in
*--index-url*torch==*) {second} ;;
*torch==*) {first} ;;
esac
"""


@pytest.fixture
def set_up(tmp_path):
    """Run setup.sh in a checkout whose Python and uv do nothing but what a test says of pip."""

    def run(**answers):
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, tmp_path / name)
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        folder = tmp_path / ".venv/bin"
        folder.mkdir(parents=True)
        for name, text in (("python", PIP.format(**answers)), ("uv", "#!/bin/sh\ncat >/dev/null")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        done = subprocess.run(
            ["bash", "scripts/setup.sh"],
            cwd=tmp_path,
            env=os.environ | {"PIP_FIND_LINKS": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        return done, [c for c in calls if "torch==" in c]

    return run


@pytest.mark.parametrize(
    "failure",
    [
        "echo 'ERROR: No matching distribution found for torch' >&2; exit 1",
        "echo 'ERROR: Could not find a version that satisfies the requirement' >&2; exit 1",
        "echo 'ConnectionError: [Errno 111] Connection refused' >&2; exit 2",
        "exit 1",
    ],
)
def test_torch_comes_from_pytorchs_index_where_pip_fails(set_up, failure):
    done, calls = set_up(first=failure, second="exit 0")
    assert done.returncode == 0, done.stderr
    assert ["--index-url" in call for call in calls] == [False, True]


def test_what_pip_finds_is_taken(set_up):
    done, calls = set_up(first="exit 0", second="exit 1")
    assert done.returncode == 0, done.stderr
    assert ["--index-url" in call for call in calls] == [False]


def test_both_failures_are_told(set_up):
    done, _ = set_up(first="echo mirror down >&2; exit 1", second="echo no index >&2; exit 1")
    assert done.returncode != 0
    for told in ("mirror down", "no index", "could not install torch=="):
        assert told in done.stderr
