"""What vLLM's engine is started with. No engine is started."""

import pkgutil

import pytest
import torch

from rollout_server import RolloutConfig
from rollout_server.engine import arguments
from rollout_server.errors import OutOfMemoryError

GIB = 1 << 30


@pytest.mark.parametrize("constant", ["WORKER_EXTENSION", "CPU_WORKER"])
def test_the_classes_that_the_engine_process_loads_are_where_the_strings_say(constant):
    """Nothing on this side imports rollout_server.worker, so no import shows a wrong name."""
    named = getattr(arguments, constant)
    module, _, name = named.rpartition(".")
    assert module.startswith("rollout_server.worker.")
    found = pkgutil.resolve_name(f"{module}:{name}")
    assert isinstance(found, type)
    assert (found.__module__, found.__qualname__) == (module, name)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 80 GiB: the first is free, of the second a trainer has left 12 GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    free = {0: 79 * GIB, 1: 12 * GIB, None: 79 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free[device], 80 * GIB))
    return free


def started_with(**options):
    config = RolloutConfig(**options)
    return arguments.engine_arguments(
        config, "m", "f", ["policy"], "bfloat16", {}, 0, False, device=1
    )


def accepted(chosen, free):
    """Whether vLLM's own check lets an engine start beside a trainer that has left `free` bytes."""
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.worker.utils import request_memory

    there = MemorySnapshot(device="cpu", auto_measure=False)
    there.free_memory, there.total_memory = free, 80 * GIB
    default = 0.92  # vLLM's
    share = chosen.get("gpu_memory_utilization", default)
    cache = type("CacheConfig", (), {"gpu_memory_utilization": share})
    try:
        request_memory(there, cache)
    except ValueError:
        return False
    return True


def test_a_kv_cache_of_a_given_size_can_be_had_beside_a_trainer(gpus):
    chosen = started_with(kv_cache_memory_bytes=4 * GIB)
    assert chosen["kv_cache_memory_bytes"] == 4 * GIB
    assert accepted(chosen, gpus[1])
    assert not accepted({}, gpus[1])  # as vLLM has it where it is told nothing
    with pytest.raises(OutOfMemoryError, match="only 12884901888 bytes"):
        started_with(kv_cache_memory_bytes=13 * GIB)


def test_the_trainers_own_gpu_is_measured(gpus):
    assert started_with()["gpu_memory_utilization"] == pytest.approx(6 / 80, abs=1e-3)
    assert "kv_cache_memory_bytes" not in started_with()


def test_a_share_that_is_given_is_not_measured(gpus):
    gpus.clear()
    assert started_with(gpu_memory_utilization=0.3)["gpu_memory_utilization"] == 0.3
