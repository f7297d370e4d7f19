"""`attach` with the reckoning, over a GPU that a stand-in has: no engine is started."""

import dataclasses
import re

import pytest
import torch
from support import MIB

from rollout_server import RolloutConfig, attach
from rollout_server.errors import OutOfMemoryError, RolloutServerError
from rollout_server.memory.attached import demand_of, planned, require_room
from rollout_server.memory.plan import plan
from rollout_server.memory.sizes import GIB
from rollout_server.progress import Progress
from rollout_server.weights.policy import Policy

QUIET = Progress(False)


@pytest.fixture
def gpu(monkeypatch):
    """One GPU, number 1; tests say what of it is free. Asking for another one fails."""
    memory = {"free": 79 * GIB, "total": 80 * GIB, "emptied": 0}

    def mem_get_info(device):
        assert device == 1
        return memory["free"], memory["total"]

    def empty_cache():
        memory["emptied"] += 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    return memory


def policy_of(model, optimizer=None, **fields):
    return Policy(
        model=lambda: model,
        tokenizer=None,
        owner=model,
        optimizer=None if optimizer is None else lambda: optimizer,
        **fields,
    )


def demanded(policy, total=80 * GIB, **options):
    config = RolloutConfig(**options)
    return demand_of(policy, config, policy.source(config.peft), total - GIB, total)


def size(model):
    return sum(p.nbytes for p in model.parameters())


def test_a_policy_and_its_optimizer(tiny):
    demand, certain = demanded(policy_of(tiny, torch.optim.AdamW(tiny.parameters())))
    assert certain
    assert demand.weights == demand.gradients == demand.engine_weights == size(tiny)
    steps = 4 * len(list(tiny.parameters()))
    assert demand.optimizer == 2 * size(tiny) + steps
    assert demand.others == GIB
    assert demand.movable and demand.shareable and not demand.bucket


def test_mixed_precision_and_shards(tiny):
    policy = policy_of(tiny, compute_dtype="bfloat16", optimizer_name="sgd", shards=4)
    demand, certain = demanded(policy)
    assert certain and demand.optimizer == 0
    assert demand.weights == size(tiny) // 4
    assert demand.engine_weights == size(tiny) // 2 == demand.casts
    assert demand.gathered > 0 and demand.bucket == 512 * MIB and not demand.shareable


def test_a_kv_cache_that_is_given_stays_and_one_that_isnt_is_reckoned(tiny, gpu):
    policy = policy_of(tiny, optimizer_name="adamw_torch")
    source = policy.source("merge")
    given = planned(policy, RolloutConfig(kv_cache_memory_bytes=7 * MIB), source, QUIET)
    assert given.kv_cache_memory_bytes == 7 * MIB and gpu["emptied"] == 1
    reckoned = planned(policy, RolloutConfig(), source, QUIET).kv_cache_memory_bytes
    assert 0 < reckoned < 79 * GIB
    gpu["free"] = 79 * GIB - plan(demanded(policy)[0]).most + GIB // 2
    less = planned(policy, RolloutConfig(), source, QUIET).kv_cache_memory_bytes
    assert 0 < less < GIB // 2 < reckoned


def test_the_table_is_printed_or_not(tiny, gpu, capsys):
    policy = policy_of(tiny)
    planned(policy, RolloutConfig(), policy.source("merge"), QUIET)
    assert capsys.readouterr().err == ""
    planned(policy, RolloutConfig(), policy.source("merge"), Progress(True))
    told = capsys.readouterr().err
    assert "trainer: optimizer state" in told and "It fits" in told


def test_attach_refuses_with_the_table_before_anything_starts(tiny, tokenizer, gpu):
    gpu["free"] = 2 * GIB
    with pytest.raises(OutOfMemoryError) as refused:
        attach(tiny, tokenizer, kv_cache_memory_bytes=4 * GIB, progress=False)
    text = str(refused.value)
    assert "engine: KV cache" in text and "rollout is over by" in text


def test_what_is_suggested_is_accepted(tiny, gpu):
    policy = policy_of(tiny, torch.optim.AdamW(tiny.parameters()))
    source, config = policy.source("merge"), RolloutConfig(kv_cache_memory_bytes=76 * GIB)
    with pytest.raises(OutOfMemoryError) as refused:
        planned(policy, config, source, QUIET)
    option = int(re.search(r"kv_cache_memory_bytes=(\d+) would", str(refused.value))[1])
    mended = dataclasses.replace(config, kv_cache_memory_bytes=option)
    assert planned(policy, mended, source, QUIET) == mended


def test_an_optimizer_that_is_only_assumed_is_no_reason_to_refuse(tiny, gpu):
    sure = policy_of(tiny, optimizer_name="adamw_torch")
    demand, _ = demanded(sure)
    # Room for all but what the first step will need.
    needed = plan(demand)
    gpu["free"] = 79 * GIB - (needed.most - needed.least) - demand.optimizer // 2
    with pytest.raises(OutOfMemoryError, match="It doesn't fit"):
        planned(sure, RolloutConfig(), sure.source("merge"), QUIET)
    assumed = policy_of(tiny)
    planned(assumed, RolloutConfig(), assumed.source("merge"), QUIET)


def test_without_a_gpu_nothing_is_planned(tiny):
    policy, config = policy_of(tiny), RolloutConfig()
    assert planned(policy, config, policy.source("merge"), QUIET) is config


def test_room_before_a_wake(gpu):
    gpu["free"] = 3 * GIB
    require_room(3 * GIB, 1, 0)
    with pytest.raises(OutOfMemoryError, match=r"needs 4\.0 GiB of GPU 1, and 3\.0 GiB are free"):
        require_room(4 * GIB, 1, 0)
    with pytest.raises(RolloutServerError, match=r"gradients hold 2\.0 GiB.*zero_grad"):
        require_room(4 * GIB, 1, 2 * GIB)
    assert gpu["emptied"] == 3, "what the trainer doesn't use is freed first"
