"""When a request goes on to the engine: while it is awake, and so many at a time, by turns.

One session with a thousand requests waits beside another with one, not in front of it. All requests
with the server's own key take turns as one session.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Hashable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.errors import StateError
from rollout_server.http import routes
from rollout_server.http.body import Gone, unless_gone
from rollout_server.http.middleware.access_log import note
from rollout_server.http.responses import nothing, send_error
from rollout_server.http.scope import SESSION
from rollout_server.http.server.limits import Limits
from rollout_server.lifecycle.gate import Gate, GateTimeout

_RETRY = 5  # seconds to suggest


class AdmissionQueue:
    """Used on the server's loop only. `running`: requests that are in; `queued`: that wait."""

    def __init__(self, limit: int):
        self._limit = limit
        self._queues: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()
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

    def _forget(self, owner: Hashable, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(owner)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[owner]


class AdmissionMiddleware:
    """Lets requests that generate wait, at the gate and then for their turn; 503 with Retry-After
    past their time, or where too many wait.

    waiting: how many do; a client that goes away waits no longer.
    """

    def __init__(self, app: ASGIApp, gate: Gate, limits: Limits):
        self._app = app
        self._gate = gate
        self._most = limits.held
        self.admission = AdmissionQueue(limits.running)
        gate.metrics.read("queued_requests", lambda: self.admission.queued)
        gate.metrics.read("running_requests", lambda: self.admission.running)
        self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) not in routes.GENERATES:
            await self._app(scope, receive, send)
            return
        turn, started = _Turn(), time.perf_counter()
        try:
            if self._enter_at_once(turn) or await self._let_in(scope, receive, send, turn):
                note(scope).held = time.perf_counter() - started
                await self._app(scope, receive, _telling_why(send, self._gate))
        finally:
            if turn.taken:
                self.admission.leave()

    def _enter_at_once(self, turn: "_Turn") -> bool:
        """Whether nobody and nothing needs to be waited for, as mostly."""
        free = self._gate.is_open and self.waiting < self._most
        turn.taken = free and self.admission.enter_at_once()
        return turn.taken

    async def _let_in(self, scope: Scope, receive: Receive, send: Send, turn: "_Turn") -> bool:
        """Have a request wait; False if it isn't let in, and its client has been told."""
        live = scope.get(SESSION)
        owner = None if live is None else live.session.id
        try:
            await unless_gone(receive, self._enter(owner, turn))
        except GateTimeout as late:
            await _send_unavailable(send, str(late), late.retry_after)
        except _Full:
            self._gate.metrics.count("gate_refused_requests", reason="full")
            message = f"{self._most} requests wait already; come back"
            await _send_unavailable(send, message, _RETRY)
        except StateError as shut:
            await _send_unavailable(send, str(shut))
        except Gone:
            pass
        else:
            return True
        return False

    async def _enter(self, owner: str | None, turn: "_Turn") -> None:
        if self.waiting >= self._most:
            raise _Full
        self.waiting += 1
        try:
            await self._gate.passage()
            await self.admission.enter(owner)
            try:
                await self._gate.passage()  # closed again while this one waited for its turn
            except BaseException:
                self.admission.leave()
                raise
            turn.taken = True
        finally:
            self.waiting -= 1


def _telling_why(send: Send, gate: Gate) -> Send:
    """A `send` that puts the reason in the place of a 500 that comes of a gate shut for good."""
    instead = False

    # No coroutine of its own: there are many messages.
    def tell(message: Message) -> Awaitable[None]:
        nonlocal instead
        if message["type"] == "http.response.start" and message["status"] == 500 and gate.why_shut:
            instead = True
            return send_error(send, 503, gate.why_shut, "service_unavailable")
        return nothing() if instead else send(message)

    return tell


@dataclass
class _Turn:
    taken: bool = False


class _Full(Exception):
    """As many requests wait as may."""


async def _send_unavailable(send: Send, message: str, retry_after: int | None = None) -> None:
    retry = None if retry_after is None else {"retry-after": str(retry_after)}
    await send_error(send, 503, message, "service_unavailable", retry)
