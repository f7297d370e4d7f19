"""The layers that take a request's body in, in full, in time and within limits, and hand it on.

It is read and parsed once, and is in the ASGI scope for all that are between them.

Behind the key and the routes, so nothing is read for who may not call; in front of the gate, so
that a request that is held has a body of known size, and its client's going away is noticed.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.http.body import Gone, again, apart, parse, read_body, written
from rollout_server.http.refusals import refuse_content, refuse_headers
from rollout_server.http.responses import BadRequest, send_error
from rollout_server.http.scope import BODY, REQUEST, SIZE
from rollout_server.http.server.connections import lingering
from rollout_server.http.server.limits import Limits

_CUT = {"connection": "close"}  # what else the client sends isn't read


class _Refused(Exception):
    def __init__(self, status: int, message: str, kind: str, headers: dict[str, str]):
        super().__init__(message)
        self.answer = status, message, kind, headers


class BodyLimitMiddleware:
    """413 for a body past the limit, 408 for one that takes too long, 400 for what isn't JSON or
    asks for what isn't given, 503 where all bodies together are too many."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        self._limits = limits
        self._bytes = 0  # of all bodies that are there

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        taken = 0

        def grow(size: int) -> None:
            nonlocal taken
            taken += size
            self._bytes += size
            self._require_room(taken)

        try:
            try:
                refuse_headers(scope["headers"])
                body, request = await self._take(scope, receive, send, grow)
            except BadRequest as error:
                await send_error(send, 400, str(error), "invalid_request_error")
                return
            except _Refused as refused:
                self._bytes -= taken
                taken = 0
                await send_error(lingering(receive, send), *refused.answer)
                return
            except Gone:
                return
            scope = {**scope, BODY: body, REQUEST: request, SIZE: len(body)}
            await self._app(scope, receive, send)
        finally:
            self._bytes -= taken

    async def _take(
        self, scope: Scope, receive: Receive, send: Send, grow: Callable[[int], None]
    ) -> tuple[bytes, Any]:
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit():
            self._require_room(int(length))
        patience = self._limits.patience
        try:
            async with asyncio.timeout(patience):
                body = await read_body(receive, grow)
        except TimeoutError:
            message = f"the body wasn't there after {patience:g} s; send it faster"
            await send_error(send, 408, message, "timeout_error", _CUT)
            raise Gone from None
        if not body:
            return body, {}
        return body, await apart(len(body), _request, scope["path"], body)

    def _require_room(self, size: int) -> None:
        most = self._limits.body_bytes
        if size > most:
            message = f"the body has more than {most} bytes; send less at a time"
            raise _Refused(413, message, "invalid_request_error", _CUT)
        if self._bytes > self._limits.bodies_bytes:
            message = "too many large requests at once; come back"
            raise _Refused(503, message, "service_unavailable", _CUT | {"retry-after": "1"})


def _request(path: str, body: bytes) -> Any:
    request = parse(body)
    refuse_content(path, request)
    return request


class ReplayBody:
    """The innermost: the app reads the body from its `receive`, as any."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if BODY in scope:
            body = scope[BODY]
            if body is None:
                body = await apart(scope[SIZE], written, scope[REQUEST])
            receive = again(body, receive)
        await self._app(scope, receive, send)
