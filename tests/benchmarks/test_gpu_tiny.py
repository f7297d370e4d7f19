"""All parts of `python -m rollout_server.bench gpu --tiny` on this machine: they work, and within
three minutes. Its figures are of tiny models and tell nothing."""

import json
import subprocess
import sys
import time

import pytest
import torch

from rollout_server.bench.gpu.parts import NAMES


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's run: what it can't do is named")
def test_every_part(tmp_path, report):
    command = [sys.executable, "-m", "rollout_server.bench", "gpu", "--tiny"]
    started = time.monotonic()
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    taken = time.monotonic() - started
    print("\n" + done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: found["status"] for name, found in parts.items()} == dict.fromkeys(NAMES, "done")
    skipped = {what for found in parts.values() for what in found["skipped"]}
    assert {"vLLM's own transfer, ipc", "weights in fp8", "CUDA graphs"} <= skipped
    report({"all parts (at most 180 s)": f"{taken:.0f} s"})
    assert taken <= 180
