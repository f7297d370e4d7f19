"""Wakes that run out of memory: once, and each time. Real engines; the failure is injected."""

import inside
import pytest
import short_of_memory
import torch
from support import MIB, greedy, large_step, trainer_logprobs

from rollout_server import attach
from rollout_server.errors import EngineDeadError, StateError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT = [21, 22, 23]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return tmp_path_factory.mktemp("wakes") / "wakes"


@pytest.fixture(scope="module")
def policy(tiny_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def short(policy, tokenizer, failures):
    """One server: it has one restart, which the tests use up in their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(short_of_memory.VARIABLE, str(failures))
        with attach(
            policy,
            tokenizer,
            engine_args={"worker_cls": short_of_memory.NAME},
            kv_cache_memory_bytes=64 * MIB,
            max_restarts=1,
            progress=False,
        ) as server:
            yield server


def told(failures, tag, number):
    failures.write_text(f"{tag} {number}\n")
    failures.with_suffix(".freed").unlink(missing_ok=True)


def failed(failures):
    """Process ids of the engines whose wakes have failed."""
    return [int(line.split()[1]) for line in failures.read_text().splitlines()[1:]]


def assert_exact(server, policy):
    server.verify_weights()
    answer = greedy(server, PROMPT)
    own = trainer_logprobs(policy, PROMPT, answer.ids)
    assert torch.allclose(
        torch.tensor(answer.logprobs), own[range(12), answer.ids], atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("tag", ["weights", "kv_cache"])
def test_once_frees_and_tries_again(short, policy, failures, tag):
    pid, version = short.engine_pid, short.policy_version
    short.sleep()
    large_step(policy, PROMPT, seed=1)
    told(failures, tag, 1)
    short.wake()
    assert short.state == "awake" and short.engine_pid == pid
    assert failed(failures) == [pid]
    assert failures.with_suffix(".freed").read_text() == f"{tag}\n"
    assert short.policy_version == version + 1
    assert_exact(short, policy)
    assert inside.restarts(short).count == 0


def test_each_time_is_a_lost_engine(short, policy, failures):
    """The next one wakes, with what the first couldn't have."""
    pid, version = short.engine_pid, short.policy_version
    short.sleep()
    large_step(policy, PROMPT, seed=2)
    told(failures, "kv_cache", 2)
    short.wake()
    assert failed(failures) == [pid, pid]
    assert short.state == "awake" and short.engine_pid != pid
    assert inside.restarts(short).count == 1
    assert short.policy_version == version + 1
    assert_exact(short, policy)


def test_without_a_restart_it_is_broken_and_says_why(short, failures):
    """The one restart of this server is used up."""
    short.sleep()
    told(failures, "weights", 9)
    with pytest.raises(EngineDeadError, match=r"out of memory.*kv_cache_memory_bytes"):
        short.wake()
    assert short.state == "broken" and len(failed(failures)) == 2
    with pytest.raises(StateError, match="waking the weights: the engine is out of memory"):
        short.wake()
