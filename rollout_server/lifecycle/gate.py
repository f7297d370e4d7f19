"""The gate in front of the engine: requests wait here while weights move or the engine sleeps.

Held, not refused: an agent's client would give up after a few retries, but it waits happily. Those
inside can ask that it closes behind them only, or be told when the weights have changed.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine, Iterator
from typing import Any

from rollout_server.concurrency.race import Preempted, run_until
from rollout_server.errors import StateError
from rollout_server.observability.metrics import Metrics


class GateTimeout(Exception):
    """A request has waited for as long as it may. `retry_after`: seconds to suggest."""

    def __init__(self, waited: float):
        super().__init__(f"the engine wasn't ready within {waited:g} s")
        self.retry_after = max(1, math.ceil(waited / 10))


class Gate:
    """Open, closed, or shut for good. Used on the server's loop only.

    held: number of requests that wait here; to_finish: of those inside that must finish before the
    engine rests.
    """

    def __init__(self, hold_timeout: float, metrics: Metrics | None = None):
        self._hold_timeout = hold_timeout
        self.metrics = metrics or Metrics()
        self._open = asyncio.Event()
        self._shut: str | None = None
        self._renewed = asyncio.Event()
        self.held = 0
        self.to_finish = 0

    @property
    def is_open(self) -> bool:
        return self._shut is None and self._open.is_set()

    @property
    def why_shut(self) -> str | None:
        return self._shut

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def shut(self, why: str) -> None:
        """Close for good: all who wait, and all who come, get `StateError(why)`."""
        self._shut = why
        self._open.set()

    async def passage(self) -> None:
        """Return once the gate is open; `GateTimeout` past hold_timeout, `StateError` if shut."""
        if not self._open.is_set():
            self.held, started = self.held + 1, time.perf_counter()
            try:
                async with asyncio.timeout(self._hold_timeout):
                    # Opened and closed again before this task ran: wait on.
                    while not self._open.is_set():
                        await self._open.wait()
            except TimeoutError:
                self.metrics.count("gate_refused_requests", reason="timeout")
                raise GateTimeout(self._hold_timeout) from None
            finally:
                self.held -= 1
                self.metrics.observe("gate_held_seconds", time.perf_counter() - started)
        if self._shut is not None:
            self.metrics.count("gate_refused_requests", reason="shut")
            raise StateError(self._shut)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Around a request that must finish before the engine rests."""
        self.to_finish += 1
        try:
            yield
        finally:
            self.to_finish -= 1

    def renew(self) -> None:
        """The engine has new weights, with which what runs will go on."""
        self._renewed.set()
        self._renewed = asyncio.Event()

    async def unless_renewed(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` gives; None, and `work` is cancelled, if the weights change before."""
        renewed = self._renewed
        try:
            result = await run_until(renewed.wait, work)
        except Preempted:
            return None
        return None if renewed.is_set() else result
