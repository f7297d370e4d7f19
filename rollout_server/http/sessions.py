"""Whose request it is: the server's own, or a session's, by its URL or by its key."""

import hmac
import re
import threading
from dataclasses import dataclass, field

from rollout_server.errors import ConfigError
from rollout_server.http import routes
from rollout_server.http.accepted import Accepted
from rollout_server.http.ending import Ending
from rollout_server.http.errors import send_error, send_json
from rollout_server.http.history import History
from rollout_server.http.intake import REQUEST
from rollout_server.http.retries import Retries
from rollout_server.http.routes import GEMINI, REWARD
from rollout_server.http.seen import note
from rollout_server.observability.events import Journal
from rollout_server.trajectories.session import Session

_URL = re.compile(r"/sessions/([^/]+)(/.*)?")
SESSION = "rollout_session"  # in the ASGI scope: a `Live` or None
_TOKEN_BYTES = 96  # an id, a float, and their places in two lists
SURFACE = "rollout_surface"  # there too: the prefix under which a dialect has the routes


@dataclass
class Live:
    """An open session and its conversations."""

    session: Session
    history: History = field(default_factory=History)
    accepted: Accepted = field(default_factory=Accepted)
    ending: Ending = field(default_factory=Ending)

    @property
    def bytes(self) -> int:
        """About what its record takes: tokens with their log-probabilities, and messages, of which
        there are up to three forms."""
        return _TOKEN_BYTES * self.session.tree.size + 3 * self.history.size


class Sessions:
    """Those that are open. Used from any thread.

    retries: their last answers, for clients that ask again.
    """

    def __init__(
        self, journal: Journal | None = None, retry_bytes: int = 64 << 20,
        session_bytes: int = 256 << 20,
    ):  # fmt: skip
        """retry_bytes, session_bytes: see `max_retry_bytes` and `max_session_bytes` of
        `RolloutConfig`."""
        self._journal = journal or Journal()
        self.session_bytes = session_bytes
        self.retries = Retries(retry_bytes)
        self._lock = threading.Lock()
        self._by_id: dict[str, Live] = {}
        self._by_key: dict[bytes, Live] = {}

    def add(self, session: Session) -> None:
        with self._lock:
            live = Live(session)
            self._by_id[session.id] = live
            self._by_key[session.api_key.encode()] = live
        self._journal.session_opened(session.number)

    def remove(self, session: Session) -> None:
        with self._lock:
            live = self._by_id.pop(session.id, None)
            self._by_key.pop(session.api_key.encode(), None)
        if live is not None:
            live.ending.happen()
        self.retries.forget(session.id)
        self._journal.session_ended(session.number, len(session.tree.calls))

    def of_url(self, name: str) -> Live | None:
        return self._by_id.get(name)

    def of_key(self, key: bytes) -> Live | None:
        # Found by hash: what a wrong key's bytes have in common with a right one's isn't told.
        return self._by_key.get(key)

    def __len__(self) -> int:
        return len(self._by_id)


class Owner:
    """401 unless the request has a key, or a URL, that is the server's or an open session's; 403
    where a session's doesn't open the route.

    Takes the session's part off the path, and puts the session into the scope.
    """

    def __init__(self, app, key: str, sessions: Sessions):
        self._app = app
        self._key = key.encode()
        self._sessions = sessions

    async def __call__(self, scope, receive, send):
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
                    send, "wrong or missing API key, or that of a session that has ended; send the "
                    "server's api_key, or a session's, as 'Authorization: Bearer <key>'",
                )  # fmt: skip
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


class Rewards:
    """`POST /v1/reward` with {"reward": number, "components": {name: number}}, for a session."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", REWARD):
            await self._app(scope, receive, send)
            return
        live = scope.get(SESSION)
        if live is None:
            message = "a reward is a session's: use its URL or its api_key"
            await send_error(send, 400, message, "invalid_request_error")
            return
        try:
            given = scope[REQUEST]
            if not isinstance(given, dict) or not {"reward", "components"} >= given.keys():
                raise ConfigError('give {"reward": number, "components": {name: number}}')
            components = given.get("components") or {}
            if not isinstance(components, dict):
                raise ConfigError(f"components={components!r}: give numbers by name")
            live.session.set_reward(given.get("reward"), components)
        except ValueError as error:
            await send_error(send, 400, str(error), "invalid_request_error")
            return
        session = live.session
        await send_json(send, {"reward": session.reward, "components": session.components})


def _opens(method: str, path: str) -> bool:
    """Whether a session may go on to a route; what there is no such route of is told further in."""
    return routes.of_session(method, path) or not routes.known(method, path)


def _rewrite(scope, path: str) -> None:
    scope["path"], scope["raw_path"] = path, path.encode()


async def _refuse(send, message: str) -> None:
    challenge = {"www-authenticate": "Bearer"}
    await send_error(send, 401, message, "authentication_error", challenge)


def _given(headers) -> bytes:
    """The key of a request; none where it has two that a reader could choose from."""
    keys = [v for k, v in headers if k == b"authorization"]
    scheme, _, token = keys[0].partition(b" ") if len(keys) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer":
        others = [v for k, v in headers if k == b"x-api-key"]
        token = others[0] if len(others) == 1 and len(keys) <= 1 else b""
    return token.strip()
