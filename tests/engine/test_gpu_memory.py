"""How much of a GPU an engine beside a trainer gets, by vLLM's own accounts. No GPU, no engine."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from rollout_server import RolloutConfig, assembly, attach, colocation
from rollout_server.engine import arguments
from rollout_server.engine.gpu_memory import GIB, Need, overhead, shared_kv_cache
from rollout_server.errors import EngineStartError, OutOfMemoryError

CACHED = 6 * GIB  # by the trainer's allocator, of tensors that are gone
FREE, TOTAL = 30 * GIB, 80 * GIB
SEVEN_B = Need(weights=14 * GIB, overhead=4 * GIB)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with a trainer on it, whose cache can be emptied; `calls` in their order."""
    gpu = SimpleNamespace(free=FREE - CACHED, calls=[])

    def emptied():
        gpu.calls.append("empty_cache")
        gpu.free = FREE

    def measured(device=None):
        gpu.calls.append("mem_get_info")
        return gpu.free, TOTAL

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: gpu.calls.append("ipc_collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(torch.cuda, "mem_get_info", measured)
    return gpu


def started_with(need=SEVEN_B, **options):
    config = RolloutConfig(**options)
    return arguments.engine_arguments(config, "m", "f", ["p"], "bfloat16", {}, 0, False, 0, need)


def vllm_kv_cache(chosen, change):
    """What vLLM's own worker measures for the KV cache; change: of what is free while it loads, by
    another process."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker import gpu_worker

    cache = SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=0.92)
    vars(cache).update((k, v) for k, v in chosen.items() if hasattr(cache, k))
    before = SimpleNamespace(free_memory=FREE, total_memory=TOTAL, device_=None)
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE))
    worker = SimpleNamespace(
        cache_config=cache,
        init_snapshot=before,
        requested_memory=gpu_worker.request_memory(before, cache),
        vllm_config=config,
        model_config=SimpleNamespace(multimodal_config=None),
        parallel_config=SimpleNamespace(),
        model_runner=SimpleNamespace(model_memory_usage=0, profile_run=lambda **_: None),
        randomize_dummy_inputs=False,
        _scoped_allocator_max_split=lambda **_: contextlib.nullcontext(),
    )

    @contextlib.contextmanager
    def profiling(*_, **__):
        yield SimpleNamespace(
            after_profile=SimpleNamespace(free_memory=FREE + change),
            total_consumed=-change,
            transient_peak_headroom=0,
            non_kv_cache_memory=max(-change, 0),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_worker, "maybe_apply_startup_plan", lambda _: None)
        patch.setattr(gpu_worker, "memory_profiling", profiling)
        patch.setattr(gpu_worker, "set_current_vllm_config", lambda _: contextlib.nullcontext())
        return gpu_worker.Worker.determine_available_memory(worker)


def test_vllm_refuses_memory_that_becomes_free_meanwhile():
    """As when the trainer's cache is emptied after vLLM has first looked."""
    with pytest.raises(AssertionError, match="release GPU memory while vLLM is profiling"):
        vllm_kv_cache({"gpu_memory_utilization": 0.2}, CACHED)


@pytest.mark.parametrize("change", [CACHED, -CACHED, 0])
def test_with_shared_weights_vllm_gets_the_size_of_its_kv_cache(gpu, change):
    gpu.free = FREE
    chosen = started_with(colocate="share")
    assert chosen["kv_cache_memory_bytes"] == FREE // 2 - SEVEN_B.overhead
    assert vllm_kv_cache(chosen, change) == chosen["kv_cache_memory_bytes"]


def test_a_share_that_is_given_includes_the_shared_weights(gpu):
    gpu.free = FREE
    chosen = started_with(colocate="share", gpu_memory_utilization=0.4)
    expected = int(0.4 * TOTAL) - SEVEN_B.weights - SEVEN_B.overhead
    assert chosen["kv_cache_memory_bytes"] == expected
    assert vllm_kv_cache(chosen, 0) == expected
    # Never more than is free, whatever share is given.
    assert shared_kv_cache(FREE, TOTAL, 1.0, SEVEN_B) == FREE - SEVEN_B.overhead
    chosen = started_with(colocate="share", gpu_memory_utilization=0.9, kv_cache_memory_bytes=GIB)
    assert chosen["kv_cache_memory_bytes"] == GIB
    assert vllm_kv_cache(chosen, 0) == GIB  # of 0.9 so much isn't free: the trainer's weights


@pytest.mark.parametrize("options", [{"gpu_memory_utilization": 0.2}, {}])
def test_what_does_not_fit_is_refused_with_the_options_that_would(gpu, options):
    gpu.free = 6 * GIB
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes") as error:
        started_with(colocate="share", **options)
    assert str(6 * GIB) in str(error.value) and str(SEVEN_B.overhead) in str(error.value)


@pytest.mark.parametrize("mode", ["sleep", "share", "resident"])
def test_the_trainers_cache_is_emptied_before_anything_is_measured(
    gpu, monkeypatch, mode, tiny, tokenizer
):
    async def measuring(*_, **__):
        torch.cuda.mem_get_info(0)
        raise EngineStartError("enough")

    monkeypatch.setattr(assembly, "start_engine", measuring)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(EngineStartError):
        attach(tiny, tokenizer, colocate=mode, progress=False)
    assert gpu.calls[:3] == ["ipc_collect", "empty_cache", "mem_get_info"]


def test_on_the_way_to_another_engine_too(gpu):
    config = RolloutConfig()
    with colocation.Colocation(SimpleNamespace(optimizer=None), config, None, None).beside_start(
        "f"
    ):
        assert gpu.calls == ["ipc_collect", "empty_cache"]


def test_what_an_engine_takes_besides_grows_with_its_steps():
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, vocab_size=128256)
    usual = overhead(config, 2, {})
    assert 3 * GIB < usual < 6 * GIB
    assert usual - overhead(config, 2, {"enforce_eager": True}) == GIB
    small = overhead(config, 2, {"max_num_batched_tokens": 512, "max_num_seqs": 16})
    assert 2 * GIB < small < 2.2 * GIB
    assert overhead(SimpleNamespace(), 2, {}) == 2 * GIB  # a config that says nothing
