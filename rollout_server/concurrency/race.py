"""Work that something else may put an end to."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Preempted(Exception):
    """The other thing came first."""


async def run_until(
    other: Callable[[], Coroutine[Any, Any, Any]], work: Coroutine[Any, Any, T]
) -> T:
    """What `work` gives; `Preempted`, and it is cancelled, if `other` ends before. Neither runs any
    more afterwards."""
    task = asyncio.ensure_future(work)
    tasks: list[asyncio.Task[Any]] = [task]
    try:
        await asyncio.sleep(0)
        if not task.done():  # most needn't wait
            tasks.append(asyncio.ensure_future(other()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Preempted
        return task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
