"""The layer in front of vLLM's app in which requests become calls (see calls.py).

On the way in, what the request tells of earlier answers' tokens is checked; on the way out, the
answer is marked: the header `x-policy-version` and the field `policy_version` (of the JSON body, or
of each event of a stream) tell the newest version that may have sampled a token of it,
`policy_versions`, per choice, which version sampled which tokens. Where log-probabilities or token
ids were asked for, a chat answer's message carries its tokens. In a session the call is recorded.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.http import routes
from rollout_server.http.body import apart
from rollout_server.http.middleware.access_log import note
from rollout_server.http.middleware.marking import MarkedAnswer
from rollout_server.http.middleware.marks import asks
from rollout_server.http.responses import BadRequest, send_error
from rollout_server.http.retries import Retries
from rollout_server.http.routes import COMPLETIONS, CONVERSATIONS
from rollout_server.http.scope import BODY, REQUEST, SESSION, SIZE
from rollout_server.http.sessions import Live
from rollout_server.http.tokens.calls import Call, current
from rollout_server.http.tokens.fields import parse_client_tokens
from rollout_server.http.tokens.history import History
from rollout_server.http.tokens.options import NAMES, Options
from rollout_server.lifecycle.gate import Gate

_ANSWERS = 8192  # that are remembered outside of sessions
_RENDERS = routes.GENERATES | {("POST", "/tokenize")}
_OURS = frozenset(NAMES)


class RecordingMiddleware:
    """Only for requests that render or sample; others pass."""

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        version: Callable[[], int],
        vocabulary: int,
        sampling: Mapping[str, Any],
        retries: Retries,
    ):
        """version: the policy's; vocabulary: number of token ids; sampling: defaults of the
        sampling fields; retries: where answers of sessions are remembered."""
        self._app = app
        self._gate = gate
        self._version = version
        self._temperature = sampling.get("temperature")
        self._vocabulary = vocabulary
        self._retries = retries
        # What was answered outside of sessions: a client that sends tokens back is compared with.
        self._answered = History(limit=_ANSWERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) not in _RENDERS:
            await self._app(scope, receive, send)
            return
        live, given = scope.get(SESSION), scope[REQUEST]
        request = given if isinstance(given, dict) else {}  # vLLM will tell its sender
        try:
            call = await apart(scope[SIZE], self._call, scope["path"], live, request)
            note(scope).call = call
        except BadRequest as error:
            await send_error(send, 400, str(error), "invalid_request_error")
            return
        answered, version = self._answered, self._version
        if live is None:
            path = scope["path"]
            answer = MarkedAnswer(path, request, call, None, answered, send, version, None)
            await self._pass_on(scope, receive, answer, call, request)
            return
        session = live.session.id
        name, may_repeat = await apart(scope[SIZE], _named, scope)
        if may_repeat and (before := await self._retries.find(session, name)):
            for message in before:
                await send(message)
            return
        copy = self._retries.copy()
        answer = MarkedAnswer(scope["path"], request, call, live, answered, send, version, copy)
        try:
            await self._pass_on(scope, receive, answer, call, request)
            if answer.good:
                self._retries.keep(session, name, copy)
        finally:
            if not answer.good:
                copy.drop()
            if live.ending.happened:  # meanwhile
                self._retries.forget(session)

    async def _pass_on(
        self,
        scope: Scope,
        receive: Receive,
        answer: MarkedAnswer,
        call: Call,
        request: dict[str, Any],
    ) -> None:
        finishes = call.options.on_sync == "finish"
        token = current.set(call)
        try:
            with self._gate.finishing() if finishes else contextlib.nullcontext():
                if not _OURS.isdisjoint(request):
                    passed_on = {n: value for n, value in request.items() if n not in _OURS}
                    scope = {**scope, BODY: None, REQUEST: passed_on}
                await self._app(scope, receive, answer.send)
        finally:
            current.reset(token)

    def _call(self, path: str, live: Live | None, request: dict[str, Any]) -> Call:
        session = None if live is None else live.session
        options = Options.of(path, request, session, self._temperature)
        told = parse_client_tokens(request, self._vocabulary)
        if session is not None and request.get("n") not in (None, 1):
            raise BadRequest(
                f"n={request['n']!r}: a session's conversation goes on from one answer; send n=1, "
                "or several requests"
            )
        return Call(
            self._version,
            self._gate,
            options,
            live,
            told,
            self._answered,
            with_logprobs=session is not None or asks(request),
            own_length=request.get("max_tokens") is not None,
            silent=path == COMPLETIONS and request.get("max_tokens") == 0,
            must_see=path in CONVERSATIONS and (session is not None or told is not None),
        )


def _named(scope: Scope) -> tuple[bytes, bool]:
    """A name of the call that a request is, which an SDK's retry has too; whether it may be one."""
    headers = dict(scope["headers"])
    told = headers.get(b"idempotency-key")
    if not (name := told):
        said = scope["path"].encode() + b"\n" + scope[BODY]
        name = hashlib.blake2b(said, digest_size=16).digest()
    return name, told is not None or headers.get(b"x-stainless-retry-count", b"0") != b"0"
