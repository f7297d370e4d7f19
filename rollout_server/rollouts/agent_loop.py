"""The event loop of async agents: a thread of its own, whose end has a deadline.

What agents do on it can't end it: it goes on after a SystemExit or KeyboardInterrupt of a task, and
one that an agent blocks is left behind for another.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from rollout_server.observability.logs import GENERAL

Work = Coroutine[Any, Any, Any]
Task = asyncio.Task[Any]
Future = concurrent.futures.Future[Any]

_BLOCKED = 1.0  # seconds without an answer
_TIDYING = 0.8  # seconds for what agents left
_THREADS = 256


class AgentLoop:
    """A thread that runs one event loop until `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_Threads())
        self._stopping = False
        self._asked: float | None = None  # when something was asked that isn't answered
        self._tidying: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._main, name="rollout-agents", daemon=True)
        self._thread.start()

    def start(self, work: Callable[[], Work | None], told: Callable[[Task], None]) -> None:
        """Run what `work` gives, if anything, as a task, and tell which; both on the loop."""

        def begin() -> None:
            if (coroutine := work()) is not None:
                told(self._loop.create_task(coroutine))

        self._call(begin)

    def cancel(self, task: Task) -> None:
        """Ask a task to end; if that isn't heard, the loop is `blocked`."""

        def heard() -> None:
            self._asked = None
            task.cancel()

        self._asked = self._asked or time.monotonic()
        self._call(heard)

    @property
    def blocked(self) -> bool:
        """Whether something that was asked of it is unanswered for too long."""
        asked = self._asked
        return asked is not None and time.monotonic() - asked > _BLOCKED

    def whereabouts(self) -> str:
        """File, line and function that its thread is at."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        at = traceback.extract_stack(frame)[-1] if frame else None
        return f"{at.filename}:{at.lineno} in {at.name}" if at else "its end"

    def stop(self) -> None:
        """End what is left on it, and the loop, as soon as it can; `join` waits for that."""

        def tidy() -> None:
            self._tidying = self._tidying or self._loop.create_task(self._tidy())

        self._call(tidy)

    def join(self, seconds: float) -> None:
        """Wait for its end, at most so many seconds."""
        self._thread.join(max(0.0, seconds))

    def _call(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(work)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._stopping:
            with contextlib.suppress(SystemExit, KeyboardInterrupt):  # the outcome of a task, too
                self._loop.run_forever()
        self._loop.close()

    async def _tidy(self) -> None:
        loop, me = self._loop, asyncio.current_task()
        loop.set_exception_handler(lambda *_: None)  # nobody waits for these any more
        end = time.monotonic() + _TIDYING
        while (left := asyncio.all_tasks() - {me}) and time.monotonic() < end:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.1)
        generators = loop.create_task(loop.shutdown_asyncgens())
        await asyncio.wait({generators}, timeout=max(0.1, end - time.monotonic()))
        for task in asyncio.all_tasks() - {me}:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        for transport in list(getattr(loop, "_transports", {}).values()):
            transport.abort()  # of clients that weren't closed
        await asyncio.sleep(0)  # their sockets are closed in the next round
        self._stopping = True
        loop.stop()


class AgentLoops:
    """The loop that async agents share, made when one needs it, and those left behind."""

    def __init__(self) -> None:
        self._loops: list[AgentLoop] = []
        self._lock = threading.Lock()  # a sync agent's thread may start a coroutine too

    @property
    def current(self) -> AgentLoop:
        """The loop that agents which begin now run on."""
        with self._lock:
            if not self._loops:
                self._loops.append(AgentLoop())
            return self._loops[-1]

    def replaced(self) -> bool:
        """Whether an agent has blocked the loop for too long; the next ones get another."""
        with self._lock:
            if not self._loops or not self._loops[-1].blocked:
                return False
            GENERAL.warning(
                "an agent blocks the event loop that async agents share, at %s; those that wait "
                "go on with another. Await what takes time, or make the agent a plain function",
                self._loops[-1].whereabouts(),
                extra={"event": "agents_blocked"},
            )
            self._loops.append(AgentLoop())
            return True

    def close(self, seconds: float) -> None:
        """Stop them; those that don't end in time end by themselves when they can."""
        end = time.monotonic() + seconds
        with self._lock:
            loops, self._loops = self._loops, []
        for loop in loops:
            loop.stop()
        for loop in loops:
            if not loop.blocked:
                loop.join(end - time.monotonic())


async def awaited(what: Awaitable[Any]) -> Any:
    """A coroutine of any awaitable."""
    return await what


class _Threads(concurrent.futures.ThreadPoolExecutor):
    """Runs each call in a thread of its own, which doesn't hold up the end of the process.

    asyncio's own pool has few threads, which agents that hang in them would take from the others,
    and Python waits for them at exit.
    """

    def __init__(self) -> None:
        super().__init__(1)  # whose thread is never made
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._free = _THREADS
        self._counting = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future = Future()
        self._calls.append(functools.partial(_settle, future, fn, args, kwargs))
        with self._counting:
            if self._free:
                self._free -= 1
                threading.Thread(target=self._work, name="rollout-agents", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            with self._counting:
                if not self._calls:
                    self._free += 1
                    return
                call = self._calls.popleft()
            call()


def _settle(
    future: Future, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
