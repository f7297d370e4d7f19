"""`run_agents` with agents that fail in every way: each has one outcome, and the others go on.

Without an engine: agents here talk to nobody, or to a small server of the tests' own.
"""

import _thread
import asyncio
import contextlib
import functools
import gc
import http.server
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from rollout_server.rollouts.agents import run_agents
from rollout_server.trajectories.session import Session

FOREVER = 600.0


class Sessions:
    """Opens sessions; knows which have ended, and how often."""

    def __init__(self, url="http://127.0.0.1:9/v1"):
        self.ended, self.opened = [], []
        self._url = url

    def __call__(self, **metadata):
        clients = openai.OpenAI, openai.AsyncOpenAI
        self.opened.append(Session(self._url, clients, self.ended.append, metadata))
        return self.opened[-1]


@pytest.fixture
def sessions():
    return Sessions()


def run(sessions, agent, examples=range(4), concurrency=4, timeout=FOREVER, **options):
    outcomes = run_agents(
        sessions, agent, examples, concurrency=concurrency, timeout=timeout, **options
    )
    assert [o.session.metadata["example"] for o in outcomes] == list(examples)
    assert sorted(s.number for s in sessions.ended) == [s.number for s in sessions.opened]
    return outcomes


def fail_as(kind):
    if kind is BaseExceptionGroup:
        raise BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError("x")])
    raise kind("an agent's own")


FAILURES = (
    ValueError,
    TimeoutError,
    StopIteration,
    StopAsyncIteration,
    asyncio.CancelledError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    BaseException,
    BaseExceptionGroup,
)


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", ["thread", "coroutine", "task", "callable"])
def test_whatever_an_agent_raises_costs_its_own_rollout(sessions, kind, way):
    async def work(session, example):
        await asyncio.sleep(0.01)
        if example == 1:
            fail_as(kind)
        await asyncio.sleep(0.01)
        return float(example)

    async def in_a_task(session, example):
        return await asyncio.wait_for(asyncio.create_task(work(session, example)), 30)

    def in_a_thread(session, example):
        if example == 1:
            fail_as(kind)
        return float(example)

    agent = {
        "thread": in_a_thread,
        "coroutine": work,
        "task": in_a_task,
        "callable": lambda session, example: work(session, example),
    }[way]
    done = []
    outcomes = run(sessions, agent, done=done.append)
    errors = [o.error for o in outcomes]
    # In a coroutine, Python turns these into RuntimeError.
    turned = (RuntimeError,) if kind in (StopIteration, StopAsyncIteration) else ()
    assert isinstance(errors.pop(1), (kind, *turned))
    assert errors == [None] * 3
    assert [o.session.reward for o in outcomes] == [0.0, None, 2.0, 3.0]
    assert len(done) == 4 and {id(o) for o in done} == {id(o) for o in outcomes}


def test_a_reward_that_is_none_costs_its_own_rollout(sessions):
    outcomes = run(sessions, lambda session, example: "high" if example == 1 else 1.0)
    assert [type(o.error).__name__ for o in outcomes] == ["NoneType", "ConfigError"] + [
        "NoneType"
    ] * 2


def test_a_thread_that_never_ends_is_given_up(sessions):
    release = threading.Event()

    def agent(session, example):
        if example == 1:
            release.wait(FOREVER)
        return 1.0

    started = time.monotonic()
    outcomes = run(sessions, agent, timeout=0.5, concurrency=1)
    release.set()
    assert time.monotonic() - started < 5
    assert [o.error is None for o in outcomes] == [True, False, True, True]
    assert "more than 0.5 s" in str(outcomes[1].error)


def test_an_agent_that_is_cancelled_and_goes_on_is_given_up(sessions):
    async def agent(session, example):
        while example == 1:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(FOREVER)
        return 1.0

    started = time.monotonic()
    outcomes = run(sessions, agent, timeout=0.5, concurrency=1)
    assert time.monotonic() - started < 5
    assert [o.error is None for o in outcomes] == [True, False, True, True]


def test_an_agent_that_blocks_the_loop_is_given_up(sessions):
    """Those that wait for their turn go on, on another loop."""
    release = threading.Event()

    async def agent(session, example):
        await asyncio.sleep(0)
        if example == 1:
            release.wait(FOREVER)
        return 1.0

    started = time.monotonic()
    outcomes = run(sessions, agent, range(6), timeout=1.0, concurrency=2)
    release.set()
    assert time.monotonic() - started < 15
    failed = [o for o in outcomes if o.error is not None]
    assert outcomes[1] in failed and len(failed) <= 2  # the one beside it may be late too
    assert "more than 1 s" in str(outcomes[1].error)


def test_what_agents_leave_behind_is_ended(sessions):
    """Tasks, generators, threads of the executor: none outlives the call by much."""
    ended, stray = [], []

    async def forever(name):
        try:
            while True:
                await asyncio.sleep(0.01)
        finally:
            ended.append(name)

    async def numbers():
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            ended.append("generator")

    kept = []

    async def agent(session, example):
        stray.append(asyncio.create_task(forever("task")))
        kept.append(numbers())
        async for _ in kept[-1]:
            break
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait, FOREVER)
        await asyncio.to_thread(time.sleep, 0)
        return 1.0

    started = time.monotonic()
    outcomes = run(sessions, agent)
    assert time.monotonic() - started < 5
    assert [o.error for o in outcomes] == [None] * 4
    assert sorted(ended) == ["generator"] * 4 + ["task"] * 4
    assert all(task.done() for task in stray)


def test_threads_of_agents_do_not_hold_up_the_end_of_the_process():
    script = """
import asyncio, threading
from rollout_server.rollouts.agents import run_agents
from rollout_server.trajectories.session import Session

async def agent(session, example):
    await asyncio.to_thread(threading.Event().wait)

def open_session(**metadata):
    return Session("http://127.0.0.1:9/v1", (None, None), lambda s: None, metadata)

print(run_agents(open_session, agent, [0, 1], concurrency=2, timeout=0.3)[0].error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "more than 0.3 s" in done.stdout
    assert "never retrieved" not in done.stderr and "pending" not in done.stderr


@pytest.fixture
def endpoint():
    """(URL, connections that are open): answers any POST."""
    open_now = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            open_now.add(self.connection)

        def finish(self):
            open_now.discard(self.connection)
            super().finish()

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", open_now
        server.shutdown()


def test_clients_that_were_never_closed_end_quietly(endpoint, recwarn, caplog):
    url, open_now = endpoint
    kept, sessions = [], Sessions(url)

    async def agent(session, example):
        client = session.async_openai()
        await client.chat.completions.create(model="policy", messages=[])
        plain = httpx.AsyncClient()
        await plain.post(session.base_url, json={})
        if example % 2:
            kept.extend([client, plain])  # as a global would
        return 1.0

    outcomes = run(sessions, agent)
    assert [o.error for o in outcomes] == [None] * 4
    deadline = time.monotonic() + 10
    while open_now and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not open_now
    kept.clear()
    gc.collect()
    assert not [w for w in recwarn if "unclosed" in str(w.message)]
    assert not [r for r in caplog.records if r.name == "asyncio"]


# -- the caller's end -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["thread", "coroutine", "stubborn", "blocking"])
def test_an_interrupt_ends_it_within_two_seconds(sessions, way):
    """A KeyboardInterrupt in the calling thread; what runs then is ended or left behind."""
    release, begun = threading.Event(), threading.Barrier(5)
    meet = functools.partial(begun.wait, 30)

    def blocking(session, example):
        meet()
        release.wait(FOREVER)

    async def coroutine(session, example):
        await asyncio.to_thread(meet)
        await asyncio.sleep(FOREVER)

    async def stubborn(session, example):
        await asyncio.to_thread(meet)
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(FOREVER)

    async def blocks(session, example):
        await asyncio.to_thread(meet)
        release.wait(FOREVER)

    agents = {"thread": blocking, "coroutine": coroutine, "stubborn": stubborn, "blocking": blocks}
    told = []

    def interrupt():
        meet()
        told.append(time.monotonic())
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(sessions, agents[way])
    took = time.monotonic() - told[0]
    release.set()
    assert took < 2
    assert len(sessions.ended) == 4, "their requests go on"


def test_a_session_that_cannot_be_opened_ends_the_run(sessions):
    def opening(**metadata):
        if len(sessions.opened) == 2:
            raise ValueError("closed")
        return sessions(**metadata)

    async def agent(session, example):
        await asyncio.sleep(FOREVER)

    with pytest.raises(ValueError, match="closed"):
        run_agents(opening, agent, range(4), concurrency=4, timeout=FOREVER)
    assert len(sessions.ended) == 2


def test_it_works_inside_a_running_loop(sessions):
    """As in a notebook."""

    async def agent(session, example):
        await asyncio.sleep(0)
        return 1.0

    async def cell():
        return run(sessions, agent)

    assert [o.error for o in asyncio.run(cell())] == [None] * 4


def test_agents_of_a_loop_share_what_belongs_to_it(sessions):
    """A semaphore, or a client: made by one of them, used by all."""
    shared, most, now = [], [0], [0]

    async def agent(session, example):
        if not shared:
            shared.append(asyncio.Semaphore(2))
        async with shared[0]:
            now[0] += 1
            most[0] = max(most[0], now[0])
            await asyncio.sleep(0.02)
            now[0] -= 1

    outcomes = run(sessions, agent, range(8), concurrency=8)
    assert [o.error for o in outcomes] == [None] * 8 and most == [2]


def test_no_more_run_at_a_time_than_asked_for(sessions):
    lock, now, most = threading.Lock(), [0], [0]

    def agent(session, example):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    run(sessions, agent, range(10), concurrency=3)
    assert most == [3]
    assert run(sessions, agent, []) == []


def test_a_port_without_a_server_is_the_agents_failure(sessions):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def agent(session, example):
        async with httpx.AsyncClient() as client:
            await client.post(f"http://127.0.0.1:{port}")

    outcomes = run(sessions, agent)
    assert {type(o.error) for o in outcomes} == {httpx.ConnectError}
