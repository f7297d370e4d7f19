"""Work that something else may put an end to."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Overtaken(Exception):
    """The other thing came first."""


async def unless(other: Callable[[], Coroutine], work: Coroutine) -> Any:
    """What `work` gives; `Overtaken`, and it is cancelled, if `other` ends before. Neither runs any
    more afterwards."""
    tasks = [asyncio.ensure_future(work)]
    try:
        await asyncio.sleep(0)
        if not tasks[0].done():  # most needn't wait
            tasks.append(asyncio.ensure_future(other()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Overtaken
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
