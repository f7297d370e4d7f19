"""What vLLM's sleep level 2 loses, with a worker that sleeps as vLLM's does on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from rollout_server.worker.keeping import keep_over_sleep


class Attention(torch.nn.Module):
    """As vLLM's: weights, buffers, a KV cache, plain tensors, and an `impl` that isn't a module."""

    def __init__(self, shared):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4, 4), 1.0))
        self.register_buffer("cos", torch.full((4,), 2.0))
        self.q_range = torch.tensor(200.0)
        self.of_weight = self.weight.data[:2]  # comes back with the weight
        self.shared = shared
        self.kv_cache = torch.full((8,), 3.0)
        self.impl = FlashAttentionImpl.__new__(FlashAttentionImpl)
        self.impl.alibi_slopes = torch.tensor([0.5, 0.25])
        self.impl.kv_cache = self.kv_cache


class Sampler:
    """Of vLLM's module, by name: objects of other packages aren't looked into."""

    __module__ = "vllm.v1.worker.gpu.sample.sampler"

    def __init__(self):
        self.states = {"thinking": [SimpleNamespace(ids=torch.tensor([9]))]}
        self.thinking = SimpleNamespace(ids=torch.tensor([7, 8]))
        self.host = torch.tensor([1.0])
        self.again = self


SimpleVllm = type("Budget", (), {"__module__": "vllm.v1.worker.gpu.sample.thinking_budget"})


class Worker:
    """Its sleep loses all that was allocated with the model and the KV cache, but for buffers."""

    def __init__(self):
        shared = torch.arange(6.0).reshape(2, 3)
        self.model = torch.nn.Sequential(Attention(shared), Attention(shared))
        sampler = Sampler()
        sampler.thinking = SimpleVllm()
        sampler.thinking.ids = torch.tensor([7, 8])
        builder = SimpleVllm()
        builder.arange = torch.arange(5)
        builder.impl = self.model[0].impl  # with the model, not with the cache
        self.model_runner = SimpleNamespace(
            sampler=sampler,
            kv_caches=[layer.kv_cache for layer in self.model],
            attn_groups=[[builder]],
        )
        self.asleep = set()
        self.lost = {
            "weights": [
                *(t for layer in self.model for t in (layer.weight.data, layer.q_range)),
                *(layer.impl.alibi_slopes for layer in self.model),
                shared,
                sampler.thinking.ids,
            ],
            "kv_cache": [*self.model_runner.kv_caches, builder.arange],
        }
        self.buffers = {}

    def get_model(self):
        return self.model

    def sleep(self, level=1):
        assert level == 2
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self.asleep = set(self.lost)
        for tensors in self.lost.values():
            for tensor in tensors:
                tensor.fill_(-1)

    def wake_up(self, tags=None):
        for tag in tags or self.lost:
            for tensor in self.lost[tag]:
                assert (tensor == -1).all(), "written while it wasn't there"
            self.asleep.discard(tag)


@pytest.fixture
def worker():
    worker = Worker()
    keep_over_sleep(worker)
    return worker


def kept(worker):
    first, second = worker.model
    return [
        first.q_range.item(),
        second.impl.alibi_slopes.tolist(),
        first.shared.tolist(),
        worker.model_runner.sampler.thinking.ids.tolist(),
    ]


EXPECTED = [200.0, [0.5, 0.25], [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [7, 8]]


@pytest.mark.parametrize("round_", range(2))
def test_what_no_sync_brings_back_is_there_after_a_sleep(worker, round_):
    for _ in range(round_ + 1):
        worker.sleep(level=2)
        assert kept(worker) != EXPECTED
        worker.wake_up(tags=["weights"])
        assert kept(worker) == EXPECTED
        builder = worker.model_runner.attn_groups[0][0]
        assert (builder.arange == -1).all(), "its memory wasn't there yet"
        worker.wake_up(tags=["kv_cache"])
        assert builder.arange.tolist() == [0, 1, 2, 3, 4]
    # Neither weights nor the KV cache are kept: a sync and the lifecycle see to these.
    assert (worker.model[0].weight == -1).all() and (worker.model[0].kv_cache == -1).all()


def test_all_at_once(worker):
    worker.sleep(level=2)
    worker.wake_up()
    assert kept(worker) == EXPECTED


def test_what_has_changed_between_two_sleeps_is_kept_as_it_was_last(worker):
    worker.sleep(level=2)
    worker.wake_up()
    worker.model_runner.sampler.thinking.ids.copy_(torch.tensor([1, 2]))
    worker.sleep(level=2)
    worker.wake_up()
    assert worker.model_runner.sampler.thinking.ids.tolist() == [1, 2]


def test_without_it_vllm_loses_them():
    worker = Worker()
    worker.sleep(level=2)
    worker.wake_up()
    assert kept(worker) == [-1.0, [-1.0, -1.0], [[-1.0] * 3] * 2, [-1, -1]]
