"""A sync's way past vLLM's sockets: two pipes, between the server's loop and the core's thread."""

import asyncio
import os
import threading
import time
from concurrent.futures import Future
from queue import Queue
from types import SimpleNamespace

import pytest

from rollout_server import vllm_compat as compat
from rollout_server.engine.line import Line
from rollout_server.errors import WeightSyncError
from rollout_server.worker import line as other_end


class Core:
    """An engine core's loop in a thread; does: what it does with a call."""

    def __init__(self, does):
        self.input_queue, self.made = Queue(), []
        self._does = does
        other_end.install(Core, lambda core, *call: core._take(*call))
        threading.Thread(target=self._loop, daemon=True).start()

    def _take(self, *call):
        self.made.append((*call, threading.current_thread().name))
        return self._does(*call)

    def _loop(self):
        threading.current_thread().name = "core"
        while True:
            self.input_queue.get()[1]()

    async def call_utility_async(self, method, *args):
        getattr(self, method)(*args)


def with_line(core, work):
    """What `work(line)` gives, on a loop."""

    async def run():
        line = await Line.open(SimpleNamespace(engine_core=core))
        assert line is not None
        try:
            return await asyncio.wait_for(work(line), 10)
        finally:
            line.close()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    monkeypatch.setattr(compat, "take_calls", lambda: None)


def test_a_call_is_made_in_the_cores_thread_and_answered():
    core = Core(lambda message, version: [b"x" * 200_000, version.encode()])

    async def twice(line):
        return await line.call(b"part", "3"), await line.call(None, "4")

    assert with_line(core, twice) == ([b"x" * 200_000, b"3"], [b"x" * 200_000, b"4"])
    assert core.made == [(b"part", "3", "core"), (None, "4", "core")]


def test_what_ends_later_is_answered_then():
    after = Future()
    core = Core(lambda *_: after)

    async def wait(line):
        asking = asyncio.ensure_future(line.call(None, "1"))
        await asyncio.sleep(0.1)
        assert core.made and not asking.done()
        threading.Thread(target=after.set_result, args=([b"done"],)).start()
        return await asking

    assert with_line(core, wait) == [b"done"]


def test_an_error_is_told():
    def fails(*_):
        raise RuntimeError("no memory")

    with pytest.raises(WeightSyncError, match="RuntimeError: no memory"):
        with_line(Core(fails), lambda line: line.call(None, "1"))


def test_what_is_too_long_goes_another_way():
    core = Core(lambda *_: [])
    assert with_line(core, lambda line: line.call(b"x" * 5000, "1")) is None
    assert core.made == []


def test_an_answer_that_nobody_waits_for_isnt_the_next_ones():
    core = Core(lambda message, version: (time.sleep(0.3), [version.encode()])[1])

    async def give_up(line):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(line.call(None, "1"), 0.05)
        return await line.call(None, "2")

    assert with_line(core, give_up) == [b"2"]


def test_nothing_is_left_open():
    before = set(os.listdir("/proc/self/fd"))
    with_line(Core(lambda *_: []), lambda line: line.call(None, "1"))
    until = time.monotonic() + 5
    # The core's end of the answers stays with its process.
    while len(left := set(os.listdir("/proc/self/fd")) - before) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(left) <= 1


def test_a_core_that_may_not_listen(monkeypatch):
    def refused(*_):
        raise PermissionError("/proc/1/fd/3")

    monkeypatch.setattr(other_end, "_open", refused)

    async def opened():
        return await Line.open(SimpleNamespace(engine_core=Core(lambda *_: [])))

    before = len(os.listdir("/proc/self/fd"))
    assert asyncio.run(opened()) is None
    assert len(os.listdir("/proc/self/fd")) == before
