"""The layer in which a turn of a session's conversation is cut to what is new in it.

vLLM reads and checks each message of a request, of a long conversation for longer than all else
takes. It is handed the messages alone that it hasn't checked before: tokens/parsed_messages.py.
"""

from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.http.body import apart
from rollout_server.http.responses import nothing
from rollout_server.http.routes import CHAT
from rollout_server.http.scope import BODY, REQUEST, SESSION, SIZE
from rollout_server.http.tokens.calls import Call, current
from rollout_server.http.tokens.parsed_messages import CachedPrefix


class IncrementalMessagesMiddleware:
    """For chat completions of sessions; others pass."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        live, request = scope.get(SESSION), scope.get(REQUEST)
        call = current.get()
        if scope["path"] != CHAT or live is None or call is None or not isinstance(request, dict):
            await self._app(scope, receive, send)
            return
        messages = request.get("messages")
        call.going_on_from(await apart(scope[SIZE], live.accepted.find, messages))
        if not call.earlier.messages or not await self._answered(scope, receive, send, call):
            await self._app(scope, receive, send)
        await apart(scope[SIZE], live.accepted.add, messages, call.messages, call.earlier)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, call: Call) -> bool:
        """Have the cut request answered. If vLLM refuses it, the whole one shall be: what is told
        of a message names its place among all."""
        request = scope[REQUEST]
        cut = {**request, "messages": request["messages"][len(call.earlier.messages) :]}
        refused = False

        # No coroutine of its own: there are many messages.
        def unless_refused(message: Message) -> Awaitable[None]:
            nonlocal refused
            start = message["type"] == "http.response.start"
            refused = refused or (start and message["status"] >= 400 and not call.messages)
            return nothing() if refused else send(message)

        await self._app({**scope, BODY: None, REQUEST: cut}, receive, unless_refused)
        if refused:
            call.going_on_from(CachedPrefix())
        return not refused
