"""The outermost layer: each request is numbered, counted, and told of in the log."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.http import routes
from rollout_server.observability.events import Journal

_NOTE = "rollout_note"  # in the ASGI scope
_GONE = 499  # the client went away before an answer began


@dataclass
class Note:
    """What the layers find out about a request.

    session: the `Live` one whose it is; call: the `Call` that it became; held: seconds at the gate.
    """

    session: Any = None
    call: Any = None
    held: float | None = None
    status: int | None = None
    started: float = field(default_factory=time.perf_counter)


def note(scope: Scope) -> Note:
    """A request's; one that nobody reads where the request came past it."""
    noted: Note | None = scope.get(_NOTE)
    return noted or Note()


class AccessLogMiddleware:
    """Answers get an `x-request-id`, by which the log calls the request."""

    def __init__(self, app: ASGIApp, journal: Journal, version: Callable[[], int]):
        """version: the policy's."""
        self._app = app
        self._journal = journal
        self._version = version
        self._prefix = f"req-{secrets.token_hex(3)}-"
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted, name = Note(), f"{self._prefix}{next(self._numbers)}"

        # No coroutine of its own: there are many messages.
        def told(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                noted.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", name.encode())]
                message = {**message, "headers": headers}
            return send(message)

        unanswered = _GONE
        try:
            await self._app({**scope, _NOTE: noted}, receive, told)
        except asyncio.CancelledError:
            raise
        except BaseException:
            unanswered = 500
            raise
        finally:
            status = unanswered if noted.status is None else noted.status
            route = routes.label(scope["path"])
            self._journal.request(route, status, lambda: self._fields(noted, name))

    def _fields(self, noted: Note, name: str) -> dict[str, Any]:
        fields = {"request_id": name, "seconds": time.perf_counter() - noted.started}
        if noted.session is not None:
            fields["session"] = noted.session.session.number
        if noted.held is not None:
            fields["held_seconds"] = noted.held
        if noted.call is not None and (generations := noted.call.generations):
            samples = [s for g in generations for s in g.samples.values()]
            fields["prompt_tokens"] = sum(len(g.prompt_ids) for g in generations)
            fields["completion_tokens"] = sum(len(s.ids) for s in samples)
        return fields | {"policy_version": self._version()}
