"""ASGI layers between uvicorn and vLLM's app: which routes there are, and the gate.

The others: whose request it is (sessions.py), its body (intake.py), what it samples (record.py).
"""

import time
from dataclasses import dataclass

from rollout_server.errors import StateError
from rollout_server.http import routes
from rollout_server.http.admission import Admission
from rollout_server.http.body import Gone, unless_gone
from rollout_server.http.errors import send_error
from rollout_server.http.limits import Limits
from rollout_server.http.seen import note
from rollout_server.http.sessions import SESSION
from rollout_server.lifecycle.gate import Gate, GateTimeout

_RETRY = 5  # seconds to suggest


class Routes:
    """404 for what isn't offered, 405 for a wrong method. Only HTTP passes."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        method, path = scope["method"], scope["path"]
        if routes.known(method, path):
            await self._app(scope, receive, send)
        elif allowed := routes.methods(path):
            message = f"{path} takes {' or '.join(allowed)}, not {method}"
            await send_error(
                send, 405, message, "method_not_allowed", {"allow": ", ".join(allowed)}
            )
        else:
            await send_error(send, 404, f"there is no route {method} {path}", "not_found_error")


class Hold:
    """Lets requests that generate wait, at the gate and then for their turn; 503 with Retry-After
    past their time, or where too many wait.

    waiting: how many do; a client that goes away waits no longer.
    """

    def __init__(self, app, gate: Gate, limits: Limits):
        self._app = app
        self._gate = gate
        self._most = limits.held
        self.admission = Admission(limits.running)
        gate.metrics.read("queued_requests", lambda: self.admission.queued)
        gate.metrics.read("running_requests", lambda: self.admission.running)
        self.waiting = 0

    async def __call__(self, scope, receive, send):
        if (scope["method"], scope["path"]) not in routes.GENERATES:
            await self._app(scope, receive, send)
            return
        if self._gate.is_open and self.waiting < self._most and self.admission.enter_at_once():
            note(scope).held = 0.0
            try:
                await self._app(scope, receive, _telling_why(send, self._gate))
            finally:
                self.admission.leave()
            return
        live, turn, started = scope.get(SESSION), _Turn(), time.perf_counter()
        try:
            try:
                owner = None if live is None else live.session.id
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
                note(scope).held = time.perf_counter() - started
                await self._app(scope, receive, _telling_why(send, self._gate))
        finally:
            if turn.taken:
                self.admission.leave()

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


def _telling_why(send, gate: Gate):
    """A `send` that puts the reason in the place of a 500 that comes of a gate shut for good."""
    instead = False

    def tell(message):  # no coroutine of its own: there are many messages
        nonlocal instead
        if message["type"] == "http.response.start" and message["status"] == 500 and gate.why_shut:
            instead = True
            return send_error(send, 503, gate.why_shut, "service_unavailable")
        return _nothing() if instead else send(message)

    return tell


async def _nothing() -> None:
    pass


@dataclass
class _Turn:
    taken: bool = False


class _Full(Exception):
    """As many requests wait as may."""


async def _send_unavailable(send, message: str, retry_after: int | None = None) -> None:
    retry = None if retry_after is None else {"retry-after": str(retry_after)}
    await send_error(send, 503, message, "service_unavailable", retry)
