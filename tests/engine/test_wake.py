"""A wake that fails, over a client that fails on purpose. No engine is started."""

import asyncio

import pytest

from rollout_server.engine.engine import Engine
from rollout_server.errors import EngineDeadError

FULL = "Call to wake_up method failed: CUDA Error: out of memory at cumem_allocator.cpp:62"


class Client:
    """`errors`: what each wake raises, in order."""

    core_dead = False

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = []

    async def wake_up(self, tags):
        self.calls.append(("wake_up", *tags))
        if self.errors:
            raise Exception(self.errors.pop(0))

    async def collective_rpc(self, method, args=()):
        self.calls.append((method, *args))
        return [None]


def engine_of(client):
    engine = Engine.__new__(Engine)
    engine.client = client
    engine.require_alive = lambda: None
    return engine


WAKE, FREE = ("wake_up", "weights"), ("rollout_free", "weights")


def test_out_of_memory_once():
    client = Client(FULL)
    asyncio.run(engine_of(client).wake_weights())
    assert client.calls == [WAKE, FREE, WAKE]


def test_out_of_memory_twice_is_the_engines_end():
    client = Client(FULL, FULL)
    with pytest.raises(EngineDeadError, match=r"out of memory.*kv_cache_memory_bytes"):
        asyncio.run(engine_of(client).wake_weights())
    assert client.calls == [WAKE, FREE, WAKE]


@pytest.mark.parametrize("errors", [["bad tag"], [FULL, "bad tag"]])
def test_what_else_fails_is_told_as_it_is(errors):
    client = Client(*errors)
    with pytest.raises(Exception, match="bad tag") as failed:
        asyncio.run(engine_of(client).wake_weights())
    assert not isinstance(failed.value, EngineDeadError)
    assert client.calls.count(WAKE) == len(errors)
