"""A 7 B-shaped model in bf16 on a GPU: a sync beside a copy on the device and vLLM's transfer."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refit")
    options = ["--preset", "7b", "--dtype", "bfloat16", "--device", "cuda", "--rounds", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "rollout_server.bench", "refit", *options, "--out", str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    print("\n" + done.stdout)
    (written,) = folder.glob("*.json")
    return json.loads(written.read_text())


def test_a_sync_has_most_of_the_bandwidth_of_a_copy(result):
    assert result["ways"]["planned"]["rounds_ratio"] <= 1 / 0.6


def test_a_sync_is_faster_than_the_transfer_of_vllm(result):
    assert "ipc" not in result["errors"], result["errors"]["ipc"]
    assert result["ways"]["planned"]["median"] < result["ways"]["ipc"]["median"]


def test_sleep_gives_back_what_the_engine_held(result):
    """Weights and the KV cache of 256 MiB, of all that the GPU holds."""
    awake, asleep = (result["memory"][f"two copies, {s}"]["device"] for s in ("awake", "asleep"))
    assert awake - asleep >= 0.95 * (result["model"]["bytes"] + (256 << 20))


def test_shared_weights_are_there_once(result):
    copies, share = (result["memory"][f"{how}, awake"]["device"] for how in ("two copies", "share"))
    assert copies - share >= 0.9 * result["model"]["bytes"]
    assert result["ways"]["share"]["median"] < 0.1 * result["ways"]["planned"]["median"] + 0.01
