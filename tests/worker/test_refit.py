"""A sync in one message: what the engine core does with it, and that it is one."""

from collections import deque
from concurrent.futures import Future
from functools import partial
from queue import Queue
from threading import Thread
from types import SimpleNamespace

import inside
import pytest
from support import greedy, large_step, trainer_logprobs

from rollout_server.engine.line import Line
from rollout_server.weights.wire import Failed, Written, pack
from rollout_server.worker import refit


class Core:
    """An engine core that tells what it was asked; resting: what its pause gives."""

    def __init__(self, report, resting=None):
        self.asked, self._report, self._resting = [], report, resting
        self.input_queue = Queue()

    def pause_scheduler(self, mode, clear_cache):
        self.asked.append(f"pause, {mode}, caches {'cleared' if clear_cache else 'kept'}")
        return self._resting

    def collective_rpc(self, method, args):
        self.asked.append(f"{method} {args[0]!r}")
        return [pack(self._report)]

    def set_weight_version(self, version):
        self.asked.append(f"version {version}")

    def resume_scheduler(self):
        self.asked.append("resume")


WHOLE = ["pause, keep, caches cleared", "rollout_write b'part'", "version 3", "resume"]


def test_it_rests_writes_raises_the_version_and_resumes():
    core = Core(Written(8, 1))
    assert refit._refit(core, b"part", "3") == [pack(Written(8, 1))]
    assert core.asked == WHOLE


def test_nothing_is_written_before_what_is_under_way_has_ended():
    resting = Future()
    core = Core(Written(8, 1), resting)
    after = refit._refit(core, b"part", "3")
    assert core.asked == WHOLE[:1] and not after.done()
    resting.set_result(None)
    assert core.asked == WHOLE and after.result(0) == [pack(Written(8, 1))]


@pytest.mark.slow  # it imports vLLM's engine
def test_requests_go_on_when_what_was_under_way_has_ended():
    """In vLLM's own loop, which would wait for another message then."""
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.engine.core import EngineCoreProc

    core = object.__new__(EngineCoreProc)
    paused = [PauseState.UNPAUSED]
    core.scheduler = SimpleNamespace(
        set_pause_state=partial(paused.__setitem__, 0),
        has_requests=lambda: paused[0] is PauseState.UNPAUSED,
    )
    core.model_executor = SimpleNamespace(collective_rpc=lambda *_: [])
    core._reset_caches = lambda: None
    core.batch_queue, core.engines_running = deque(["under way"]), False
    core.input_queue, core.aborts_queue = Queue(), Queue()
    core._idle_state_callbacks, core.process_input_queue_block = [], True
    core.is_running = lambda: True
    after = refit._refit(core, None, "3")
    assert paused[0] is PauseState.PAUSED_ALL and not after.done()
    core.batch_queue.clear()
    loop = Thread(target=core._process_input_queue, daemon=True)
    loop.start()
    loop.join(10)
    assert after.done() and core.get_weight_version() == "3" and not loop.is_alive()


def test_a_pause_that_fails_is_told():
    resting = Future()
    core = Core(Written(8, 1), resting)
    after = refit._refit(core, b"part", "3")
    resting.set_exception(RuntimeError("no rest"))
    with pytest.raises(RuntimeError, match="no rest"):
        after.result(0)
    assert core.asked == WHOLE[:1]


def test_after_a_write_that_failed_it_stays_at_rest_at_its_version():
    core = Core(Failed("traceback"))
    assert refit._refit(core, b"part", "3") == [pack(Failed("traceback"))]
    assert core.asked == WHOLE[:2]


def test_with_nothing_to_write_the_version_rises():
    core = Core(None)
    assert refit._refit(core, None, "3") == []
    assert core.asked == [WHOLE[0], *WHOLE[2:]]


def calls_of(server, monkeypatch, work):
    """Names of the messages that an engine core is sent while `work` is done; "line": by that."""
    core, names = inside.client(server).engine_core, []
    call, call_by_line = core.call_utility_async, Line.call

    async def counted_by_line(*args):
        names.append("line")
        return await call_by_line(*args)

    async def counted(name, *args):
        names.append(name if name != "collective_rpc" else args[0])
        return await call(name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(core, "call_utility_async", counted)
        patched.setattr(Line, "call", counted_by_line)
        work()
    return [name for name in names if name != "rollout_ping"]  # the watchdog's


@pytest.mark.slow
def test_a_sync_of_an_engine_that_is_awake_is_one_message(server, shared_model, monkeypatch):
    server.sync_weights()
    large_step(shared_model, [1, 2, 3], seed=5)
    version = server.policy_version
    assert calls_of(server, monkeypatch, server.sync_weights) == ["line"]
    server.verify_weights()
    answer = greedy(server, [1, 2, 3])
    assert answer.policy_version == server.policy_version == version + 1
    own = trainer_logprobs(shared_model, [1, 2, 3], answer.ids)
    assert [float(row[i]) for row, i in zip(own, answer.ids, strict=True)] == pytest.approx(
        answer.logprobs, abs=1e-4
    )


@pytest.mark.slow
def test_an_engine_that_sleeps_is_synced_step_by_step(server, monkeypatch):
    server.sleep()
    calls = calls_of(server, monkeypatch, server.wake)
    assert "line" not in calls and "rollout_refit" not in calls and "rollout_write" in calls


@pytest.mark.slow
def test_a_long_message_goes_by_vllms_own_way(server, monkeypatch):
    monkeypatch.setattr("rollout_server.engine.line.LINE_BYTES", 8)
    server.sync_weights()
    calls = calls_of(server, monkeypatch, server.sync_weights)
    assert calls == ["line", "rollout_refit"]
    server.verify_weights()
