"""Whose request it is: the server's own, or a session's, by its URL or by its key."""

import hmac
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.http import routes
from rollout_server.http.middleware.access_log import note
from rollout_server.http.responses import send_error
from rollout_server.http.routes import GEMINI
from rollout_server.http.scope import SESSION, SURFACE
from rollout_server.http.sessions import Live, Sessions

_URL = re.compile(r"/sessions/([^/]+)(/.*)?")


class AuthMiddleware:
    """401 unless the request has a key, or a URL, that is the server's or an open session's; 403
    where a session's doesn't open the route.

    Takes the session's part off the path, and puts the session into the scope.
    """

    def __init__(self, app: ASGIApp, key: str, sessions: Sessions):
        self._app = app
        self._key = key.encode()
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given, session = _given(scope["headers"]), None
        if match := _URL.fullmatch(scope["path"]):
            session, path = self._sessions.of_url(match[1]), match[2] or "/"
            other = self._sessions.of_key(given)
            if session is None or other not in (None, session):
                await _refuse(send, "this session is unknown, has ended, or isn't that of the key")
                return
            scope = {**scope, SESSION: session}
            _rewrite(scope, path)
        elif (scope["method"], scope["path"]) not in routes.PUBLIC:
            session = self._sessions.of_key(given)
            if session is None and not hmac.compare_digest(given, self._key):
                await _refuse(
                    send,
                    "wrong or missing API key, or that of a session that has ended; send the "
                    "server's api_key, or a session's, as 'Authorization: Bearer <key>'",
                )
                return
            scope = {**scope, SESSION: session}
        if scope["path"].startswith(GEMINI):
            scope = {**scope, SURFACE: GEMINI}
            _rewrite(scope, "/v1" + scope["path"].removeprefix(GEMINI))
        note(scope).session = session
        if session is None:
            await self._app(scope, receive, send)
        elif (scope["method"], scope["path"]) in routes.GENERATES and self._full(session):
            message = (
                f"this session's record has about {session.bytes} bytes, and takes no more calls "
                f"from max_session_bytes={self._sessions.session_bytes} on; end it and open another"
            )
            await send_error(send, 413, message, "invalid_request_error")
        elif not _opens(scope["method"], scope["path"]):
            message = (
                f"a session's URL and key don't open {scope['path']}, but an agent's calls alone; "
                "use the server's own URL and api_key"
            )
            await send_error(send, 403, message, "permission_error")
        else:
            await session.ending.serve(self._app, scope, receive, send)

    def _full(self, live: Live) -> bool:
        return live.bytes >= self._sessions.session_bytes


def _opens(method: str, path: str) -> bool:
    """Whether a session may go on to a route; what there is no such route of is told further in."""
    return routes.of_session(method, path) or not routes.known(method, path)


def _rewrite(scope: Scope, path: str) -> None:
    scope["path"], scope["raw_path"] = path, path.encode()


async def _refuse(send: Send, message: str) -> None:
    challenge = {"www-authenticate": "Bearer"}
    await send_error(send, 401, message, "authentication_error", challenge)


def _given(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key of a request; none where it has two that a reader could choose from."""
    keys = [v for k, v in headers if k == b"authorization"]
    scheme, _, token = keys[0].partition(b" ") if len(keys) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer":
        others = [v for k, v in headers if k == b"x-api-key"]
        token = others[0] if len(others) == 1 and len(keys) <= 1 else b""
    return token.strip()
