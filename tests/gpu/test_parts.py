"""Each part of `python -m rollout_server.bench gpu` on a GPU, in a process of its own.

A part checks what must hold; here it is seen that it has checked it on this GPU, left nothing out,
and what its figures are worth. The same parts run on the CPU in `tests/bench/test_gpu.py`.
"""

import pytest
import torch
from parts import found_by

from rollout_server.bench.gpu.parts import NAMES, PARTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MIB = 1 << 20

# What has to have been checked, besides that nothing of what was has failed.
CHECKED = {
    "refit": {"share is one copy"},
    "sleep": {"nearly all of it is given back", "the same answers after each wake"},
    "http": {"nearly as many tokens a second as LLM.generate"},
    "share": {
        "one copy only",
        "greedy tokens are the trainer's, at first",
        "step 2 is seen",
        "another engine answers",
        "greedy tokens are the trainer's, after the restart",
        "a restart leaves nothing behind",
    },
    "grpo": {
        "TRL logs sampling/importance_sampling_ratio/mean",
        "importance ratios are near 1",
        "the policy has changed",
    },
    "cycles": {"GPU memory of both doesn't grow", "host memory of both doesn't grow"},
    "logprobs": {"bf16: the gap is that of the rounding", "fp32: the gap is that of the rounding"},
    "restarts": {
        "requests were running at a sleep",
        "over a sleep they go on with the same tokens",
        "requests were running at a restart",
        "over a restart they go on with the same tokens",
    },
    "closing": {
        "sleep: the weights were seen",
        "sleep: nothing is left",
        "share: the weights were seen",
        "share: nothing is left",
    },
    "experts": {"step 3: by the path plan", "trainer and engine agree after each step"},
    "layerwise": {"step 3: by the path layerwise", "with the first weights come the first answers"},
    "fsdp": {"step 3: by the path plan", "trainer and engine agree after each step"},
}


@pytest.fixture(scope="module")
def found_of(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("parts"), {}

    def of(name):
        if name not in found:
            found[name] = found_by(name, folder, "full")
            print(f"\n{name}: {found[name].as_dict()}")
        return found[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_what_a_part_checks_holds(found_of, name):
    found = found_of(name)
    assert found.status == "done", found.failures
    assert not found.skipped, "there is a GPU"
    assert CHECKED[name] <= {check.what for check in found.checks if check.passed}


def test_each_part_is_looked_at():
    assert CHECKED.keys() == {part.name for part in PARTS}


def test_a_sync_has_most_of_the_bandwidth_of_a_copy(found_of):
    refit = found_of("refit")
    assert refit.ratio("sync_weights(), plan") <= 1 / 0.6
    assert refit.value("sync_weights(), share") < 0.1 * refit.value("sync_weights(), plan") + 0.01


def test_a_sync_is_faster_than_the_transfer_of_vllm(found_of):
    refit = found_of("refit")
    assert refit.value("sync_weights(), plan") < refit.value("vLLM's own transfer, ipc")
    assert refit.value("sync_weights(), plan") < refit.value("load_weights, a call for each tensor")


def test_sleep_gives_back_what_the_engine_held(found_of):
    assert found_of("sleep").ratio("memory given back asleep") >= 0.95


def test_share_adds_no_copy(found_of):
    """Context and graphs take less than half of five gigabytes of weights."""
    assert found_of("share").ratio("GPU memory that the engine adds to the KV cache's") < 0.5


@pytest.mark.parametrize("clients", [64, 256])
def test_http_is_nearly_as_fast_as_generate(found_of, clients):
    assert found_of("http").ratio(f"{clients} clients through HTTP") >= 0.9


def test_training_is_as_fast_as_with_a_colocated_vllm(found_of):
    assert found_of("grpo").ratio("steps an hour, attached") >= 1


def test_fifty_cycles_leave_nothing_behind(found_of):
    cycles = found_of("cycles")
    assert cycles.value("cycles") == 50
    assert cycles.value("GPU memory of both, growth") <= 16 * MIB


@pytest.mark.parametrize("colocate", ["sleep", "share"])
def test_what_was_closed_holds_nothing(found_of, colocate):
    assert found_of("closing").value(f"GPU memory left, {colocate}") <= 128 * MIB


def test_a_restart_takes_less_than_a_minute(found_of):
    assert found_of("restarts").value("SIGKILL to the next right answer") < 60
    assert found_of("share").value("SIGKILL to the next right answer, share") < 60


def test_log_probabilities_are_the_trainers(found_of):
    logprobs = found_of("logprobs")
    assert logprobs.value("fp32: mean gap") < 1e-3
    for quantile in ("1%", "99%"):
        assert abs(logprobs.value(f"fp32: importance ratio, {quantile} quantile") - 1) < 0.02
