"""How late the event loop is: what holds it holds every stream."""

import asyncio
import time

from rollout_server.metrics import Metrics

_EVERY = 0.1  # seconds


async def watch(metrics: Metrics) -> None:
    """Note the loop's lag until cancelled."""
    while True:
        due = time.perf_counter() + _EVERY
        await asyncio.sleep(_EVERY)
        metrics.observe("loop_lag_seconds", max(0.0, time.perf_counter() - due))
