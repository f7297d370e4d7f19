"""Signals that wait, and deadlines that count only the time in which the process runs."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from rollout_server.concurrency.interrupts import deliver, held, waiting
from rollout_server.concurrency.loop import LoopThread
from rollout_server.concurrency.patience import Patience, Timer, patient
from rollout_server.errors import DeadlineError
from rollout_server.ranks import Ranks


@pytest.fixture(autouse=True)
def handler():
    """Python's own for SIGINT; a server in an earlier test's loop can have left another one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        interrupt()
        done.append("the rest of it")
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_or_for_a_wait_in_it_once_its_grace_is_over():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held(grace=0.3):
        interrupt()
        deliver()
        assert waiting(lambda seconds: True, 5), "nothing to wait for"
        waiting(lambda seconds: time.sleep(seconds), 30)
    assert 0.3 <= time.monotonic() - started < 5


def test_a_second_one_waits_no_longer():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held(grace=60):
        interrupt()
        interrupt()
        waiting(lambda seconds: time.sleep(seconds), 30)
    assert time.monotonic() - started < 5


def test_the_handler_of_the_script_is_called_and_may_go_on():
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not told
            with held():
                pass
            assert not told, "the inner block isn't the end"
            deliver()
            assert told == [signal.SIGTERM]
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_of_the_block_is_what_the_interrupt_came_upon():
    with pytest.raises(KeyboardInterrupt) as caught, held():
        interrupt()
        raise ValueError("on its own")
    assert isinstance(caught.value.__context__, ValueError)


def test_an_interrupted_call_ends_what_it_waits_for():
    loop, ended = LoopThread(), threading.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    threading.Timer(0.3, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        loop.call(work(), 60, "work")
    assert ended.wait(5)
    assert loop.stop(5)


async def test_a_deadline_is_kept():
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with patient(0.3):
            await asyncio.sleep(60)
    assert 0.3 <= time.monotonic() - started < 5
    async with patient(60):
        pass


STOPPED = """
import asyncio, time
from rollout_server.concurrency.patience import Timer, patient

async def main():
    loop, closed = asyncio.get_running_loop(), []
    Timer(loop, 2.5, lambda: closed.append(1))
    async with patient(4):
        started = time.monotonic()
        print("running", flush=True)
        while time.monotonic() - started < 6:  # of which it was stopped for more than 5
            await asyncio.sleep(0.05)
        assert not closed, "what was due while it was stopped was done at once"
        print("went on", flush=True)

asyncio.run(main())
"""


def test_the_time_in_which_the_process_was_stopped_does_not_count():
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == "went on\n"
    assert process.returncode == 0


async def test_a_timer_is_on_time_otherwise():
    done = asyncio.Event()
    Timer(asyncio.get_running_loop(), 0.1, done.set)
    cancelled = Timer(asyncio.get_running_loop(), 0.05, pytest.fail)
    cancelled.cancel()
    await asyncio.wait_for(done.wait(), 5)


def test_patience_is_spent():
    patience = Patience(0.05)
    time.sleep(0.06)
    assert patience.spend() == 0 == patience.left


class Pair:
    """Two ranks, in threads of one process."""

    def __init__(self):
        store = dist.HashStore()
        self.first, self.second = (Ranks(rank, 2, store) for rank in (0, 1))


def test_a_rank_that_is_busy_is_waited_for():
    pair, told = Pair(), []

    def late():
        with pair.second.busy():
            time.sleep(1.0)
        told.append(pair.second.gather("here", 2, 5))

    thread = threading.Thread(target=late)
    thread.start()
    assert pair.first.gather("here", 1, 0.3) == [1, 2]
    thread.join(5)
    assert told == [[1, 2]]


def test_one_that_is_not_is_named():
    pair = Pair()
    with pair.second.busy():
        pass
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="rank 1 didn't come within 0"):
        pair.first.gather("here", 1, 0.3)
    assert time.monotonic() - started < 5


def test_a_wait_for_ranks_can_be_interrupted():
    pair = Pair()
    threading.Timer(0.3, interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held():
        pair.first.gather("here", 1, 60)
    assert time.monotonic() - started < 5
