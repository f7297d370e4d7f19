"""The one background thread and its asyncio loop.

Everything of a server that isn't thread-safe (vLLM's client, the HTTP app, the gate) lives on
this loop. Other threads hand it coroutines through `call`, always with a deadline.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple

from rollout_server.concurrency.interrupts import held, waiting
from rollout_server.errors import DeadlineError, StateError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def in_thread(work: Callable[[*Ts], T], *args: *Ts) -> T:
    """What `work` returns or raises, which may block. Other than with `asyncio.to_thread`, a wait
    that was given up doesn't hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    run = functools.partial(_settle, loop, future, functools.partial(work, *args))
    threading.Thread(target=run, name="rollout-wait", daemon=True).start()
    return await future


class SpawnerThread:
    """A thread that does one thing and then lives on until `stop`: the processes that it started
    die with it (PR_SET_PDEATHSIG)."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; once."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            _settle(loop, future, work)
            self._ended.wait()

        threading.Thread(target=run, name="rollout-engine", daemon=True).start()
        return await future

    def stop(self) -> None:
        self._ended.set()


def _settle(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], work: Callable[[], T]
) -> None:
    """Do `work` and tell its outcome to a future of another thread's loop."""

    def settle(method: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            method(value)

    outcome: tuple[Callable[[Any], None], Any]
    try:
        outcome = future.set_result, work()
    except BaseException as error:
        outcome = future.set_exception, error
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(settle, *outcome)


class LoopThread:
    """A daemon thread running one asyncio loop until `stop`."""

    def __init__(self, name: str = "rollout-server"):
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        """Run `work` on the loop and wait for its result from another thread.

        Past `timeout` seconds the coroutine is cancelled and `DeadlineError` raised; a
        KeyboardInterrupt in the waiting thread cancels it too.
        """
        with held():
            future = self.submit(work, what)
            return self.result(future, timeout, what)

    def submit(self, work: Coroutine[Any, Any, T], what: str) -> concurrent.futures.Future[T]:
        """Have `work` run on the loop, and go on; `result` waits for it."""
        if threading.current_thread() is self._thread:
            work.close()
            raise StateError(
                f"{what}: called from the server's own thread, which would wait forever"
            )
        if not self.alive or self._loop.is_closed():
            work.close()
            raise StateError(f"{what}: the server's thread has ended; attach() again")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def result(self, future: concurrent.futures.Future[T], timeout: float, what: str) -> T:
        """What `call` returns or raises, of something submitted before."""
        try:
            if waiting(lambda seconds: self._settled(future, seconds), timeout):
                return future.result(0)
        except concurrent.futures.CancelledError:  # by `stop`
            raise StateError(f"{what}: the server was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise
        future.cancel()
        raise DeadlineError(f"{what}: not done after {timeout:g} s")

    def _settled(self, future: concurrent.futures.Future[Any], seconds: float) -> bool:
        """Whether it is done, by then; `CancelledError` if it never will be."""
        if concurrent.futures.wait({future}, seconds).done:
            return True
        if not self.alive and not future.done():  # submitted when the loop was about to end
            raise concurrent.futures.CancelledError
        return False

    def stop(self, timeout: float) -> bool:
        """Cancel what still runs, stop the loop and join the thread; True if it ended."""
        if self.alive and not self._loop.is_closed():
            with contextlib.suppress(Exception):  # stopping goes on whatever a task does
                asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(timeout)
            self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    async def _drain(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
