"""Tiny models that see images, each attached in a process of its own: `make test-models`.

Most of their processors need torchvision, which is in a folder of its own: transformers uses it
wherever it can be imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.models, pytest.mark.slow, pytest.mark.timeout(400)]
HERE = Path(__file__).parent
BESIDE = HERE.parent / "helpers" / "beside_torchvision"
KINDS = ["idefics3", "llava", "qwen2_5_vl", "qwen3_vl"]


def seeing(kind, **options):
    """What seeing.py finds of a model."""
    folders = [
        BESIDE,
        Path(sys.prefix) / "torchvision",
        *map(HERE.parent.parent.joinpath, (".", "recipes", "tests/helpers")),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, HERE / "seeing.py", kind, json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=390,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_sees_what_the_trainer_sees(kind):
    found = seeing(kind)
    assert found["same_ids"] == [True] * 5
    assert max(found["differences"]) < 1e-4, found
    assert min(found["sensitivity"]) > 1e-2, found  # of other images the model says something else
    assert found["paths"] == ["plan"] * 4
    for goes_on, difference in found["turns"]:
        assert goes_on and difference < 1e-4, found


def test_one_copy_of_the_weights_for_both():
    found = seeing("idefics3", colocate="share")
    assert max(found["differences"]) < 1e-4, found
    assert found["paths"] == ["share"] * 4
