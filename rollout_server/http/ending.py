"""The end of a session for its requests that wait or run: they end with it.

To what serves them it is as if the client had gone away, which each part of it sees to already: a
place at the gate or in the queue is left, and the engine's generation is freed. The client, which
is still there, is told.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.http.responses import nothing, send_error

_MESSAGE = "the session of this request has ended"
_KIND = "authentication_error"  # as for one that comes later


class Ending:
    """Of one session. `happened`: it has ended."""

    def __init__(self) -> None:
        self.happened = False
        self._told = False  # to those who wait
        self._waiting: set[asyncio.Task[Any]] = set()  # for what their clients do
        self._loop: asyncio.AbstractEventLoop | None = None  # once there was a request

    def happen(self) -> None:
        """From any thread."""
        self.happened = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed runs no requests
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._told = True
        for task in self._waiting:
            task.cancel()

    async def _receive(self, receive: Receive) -> Message:
        """What `receive` gives; a disconnect at the end. No task is made for each that waits: the
        one that does is cancelled, as `asyncio.timeout` does it."""
        if self._told:
            return {"type": "http.disconnect"}
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            return await receive()
        except asyncio.CancelledError:
            if self._told and task.uncancel() <= 0:
                return {"type": "http.disconnect"}
            raise
        finally:
            self._waiting.discard(task)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have `app` answer a request, until the end."""
        self._loop = asyncio.get_running_loop()
        if self.happened:  # before there was a loop to tell
            self._told = True
        started = streams = whole = False

        def until_ended() -> Awaitable[Message]:
            return self._receive(receive)

        # No coroutine of its own: there are many messages.
        def out(message: Message) -> Awaitable[None]:
            nonlocal started, streams, whole
            if self.happened and (streams or not started):
                return nothing()
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                started, streams = True, kind.startswith(b"text/event-stream")
            else:
                whole = not message.get("more_body", False)
            return send(message)

        try:
            await app(scope, until_ended, out)
        except Exception:
            if not self.happened or (started and not streams):
                raise
        if not self.happened or whole:
            return
        if not started:
            await send_error(send, 401, _MESSAGE, _KIND, {"www-authenticate": "Bearer"})
        elif streams:  # as OpenAI's clients and Anthropic's read it
            error = {"type": "error", "error": {"type": _KIND, "message": _MESSAGE}}
            body = b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body})
