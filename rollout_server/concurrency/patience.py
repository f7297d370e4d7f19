"""Deadlines in seconds that this process has run.

A process that was stopped (Ctrl-Z, SIGSTOP, a debugger) finds every deadline passed when it goes
on, and would take an engine for hung that has answered long ago. So time is counted in short looks,
and a look that comes late counts as little more than its own length.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

LOOK = 1.0  # seconds between two looks at the most; a late one counts twice that


class Patience:
    """Some seconds to be spent.

    left: how many are; it isn't less than 0.
    """

    def __init__(self, seconds: float):
        self.left = max(0.0, seconds)
        self._looked = time.monotonic()

    def spend(self) -> float:
        """Take off what has passed since the last call, or the beginning; what is left."""
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        self.left = max(0.0, self.left - min(passed, 2 * LOOK))
        return self.left


@contextlib.asynccontextmanager
async def patient(seconds: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`: `TimeoutError` if the block isn't done within `seconds`."""
    loop, patience = asyncio.get_running_loop(), Patience(seconds)
    async with asyncio.timeout(None) as timeout:
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            if patience.spend() <= 0:
                timeout.reschedule(loop.time())
            else:
                timer = loop.call_later(min(patience.left, LOOK), look)

        timer = loop.call_later(min(patience.left, LOOK), look)
        try:
            yield
        finally:
            timer.cancel()


class Timer:
    """Calls `work` after `seconds`; once more so much later if the process was stopped meanwhile,
    since what it waits for may be there already and hasn't been looked at."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, work: Callable[[], None]):
        self._loop, self._seconds, self._work = loop, seconds, work
        self._arm()

    def _arm(self) -> None:
        self._handle = self._loop.call_later(self._seconds, self._over)

    def _over(self) -> None:
        if overslept(self._loop, self._handle.when()):
            self._arm()
        else:
            self._work()

    def cancel(self) -> None:
        self._handle.cancel()


def overslept(loop: asyncio.AbstractEventLoop, due: float) -> bool:
    """Whether what was `due` at a time of the loop's comes so late that the process must have been
    stopped."""
    return loop.time() - due > 2 * LOOK
