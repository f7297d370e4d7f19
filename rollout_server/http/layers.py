"""ASGI layers between uvicorn and vLLM's app: which routes there are, and the gate.

The others: whose request it is (sessions.py), and what it samples (record.py).
"""

import time

from rollout_server.errors import StateError
from rollout_server.http import routes
from rollout_server.http.errors import send_error
from rollout_server.http.gate import Gate, GateTimeout
from rollout_server.http.seen import note


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
    """Lets requests that generate wait at the gate; 503 with Retry-After past its time."""

    def __init__(self, app, gate: Gate):
        self._app = app
        self._gate = gate

    async def __call__(self, scope, receive, send):
        if (scope["method"], scope["path"]) in routes.GENERATES:
            started = time.perf_counter()
            try:
                await self._gate.passage()
            except GateTimeout as late:
                retry = {"retry-after": str(late.retry_after)}
                await send_error(send, 503, str(late), "service_unavailable", retry)
                return
            except StateError as shut:
                await send_error(send, 503, str(shut), "service_unavailable")
                return
            finally:
                note(scope).held = time.perf_counter() - started
            send = _telling_why(send, self._gate)
        await self._app(scope, receive, send)


def _telling_why(send, gate: Gate):
    """A `send` that puts the reason in the place of a 500 that comes of a gate shut for good."""
    instead = False

    async def tell(message):
        nonlocal instead
        if message["type"] == "http.response.start" and message["status"] == 500 and gate.why_shut:
            instead = True
            await send_error(send, 503, gate.why_shut, "service_unavailable")
        elif not instead:
            await send(message)

    return tell
