"""Whose request is next: so many run at a time, and those that wait are let in by turns.

One session with a thousand requests waits beside another with one, not in front of it. All requests
with the server's own key take turns as one session.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable


class Admission:
    """Used on the server's loop only. `running`: requests that are in; `queued`: that wait."""

    def __init__(self, limit: int):
        self._limit = limit
        self._queues: OrderedDict[Hashable, deque[asyncio.Future]] = OrderedDict()
        self.running = 0
        self.queued = 0

    def enter_at_once(self) -> bool:
        """Whether nobody needs to wait, and one request more is in; `leave` must follow then."""
        if self.running < self._limit and not self._queues:
            self.running += 1
            return True
        return False

    async def enter(self, owner: Hashable) -> None:
        """Return when it is the turn of one of `owner`'s requests; `leave` must follow."""
        if self.enter_at_once():
            return
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(owner, deque()).append(turn)
        self.queued += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in at the same moment
                self.leave()
            else:
                self._forget(owner, turn)
            raise
        finally:
            self.queued -= 1

    def leave(self) -> None:
        self.running -= 1
        while self.running < self._limit and self._queues:
            owner, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[owner] = queue  # behind the others
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _forget(self, owner: Hashable, turn: asyncio.Future) -> None:
        queue = self._queues.get(owner)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[owner]
