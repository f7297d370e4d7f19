"""vLLM's own memory pool, in the engine's process, with the driver's calls recorded."""

from types import SimpleNamespace

import pytest

cumem = pytest.importorskip("vllm.device_allocator.cumem")
import torch  # noqa: E402

from rollout_server.worker.sleeping import unmap_woken  # noqa: E402


class Driver:
    """Maps and unmaps; out of memory after `room` bytes."""

    def __init__(self, room):
        self.room = room
        self.mapped = {}

    def create_and_map(self, handle):
        assert handle[2] not in self.mapped, "mapped twice"
        if sum(self.mapped.values()) + handle[1] > self.room:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")
        self.mapped[handle[2]] = handle[1]

    def unmap_and_release(self, handle):
        del self.mapped[handle[2]]


@pytest.fixture
def driver(monkeypatch):
    driver = Driver(room=10)
    monkeypatch.setattr(cumem, "create_and_map", driver.create_and_map)
    monkeypatch.setattr(cumem, "unmap_and_release", driver.unmap_and_release)
    monkeypatch.setattr(cumem, "cumem_available", True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    pool = cumem.CuMemAllocator()
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", pool)
    for number, (size, tag) in enumerate([(4, "weights"), (4, "weights"), (4, "kv_cache")]):
        data = cumem.AllocationData((0, size, number, 0), tag)
        data.is_asleep = True
        pool.pointer_to_data[number] = data
    return SimpleNamespace(driver=driver, pool=pool)


def test_a_wake_that_failed_can_be_tried_again(driver):
    pool, card = driver.pool, driver.driver
    card.room = 7
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.wake_up(["weights"])
    assert sum(card.mapped.values()) == 4, "half of it was mapped"
    assert unmap_woken("weights") == 4 and not card.mapped
    card.room = 10
    pool.wake_up(["weights"])
    assert sum(card.mapped.values()) == 8
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.wake_up(["kv_cache"])
    assert unmap_woken("kv_cache") == 0
    assert sum(card.mapped.values()) == 8, "what is awake stays"
    card.room = 12
    pool.wake_up(["kv_cache"])
    assert sum(card.mapped.values()) == 12
