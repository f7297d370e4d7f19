"""One connection: uvicorn's, with an end to the patience for clients that send or read slowly.

Bodies aren't counted here: see middleware/body_limit.py, which knows whose they are.
"""

import asyncio
import contextlib
import resource
from collections.abc import Callable
from typing import Any, cast

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rollout_server.concurrency.patience import Timer, overslept
from rollout_server.http.responses import send_error
from rollout_server.http.server.limits import Limits

_OTHER_FILES = 1024  # that this process has or may open besides connections
_LARGE = 64 << 10  # bytes
_LINGER_SECONDS, _LINGER_BYTES = 5.0, 1 << 26  # what a client may go on sending to be told why not


def connection_class(limits: Limits) -> type[HttpToolsProtocol]:
    """What uvicorn takes as `http`."""
    return type("Connection", (_Connection,), {"limits": limits})


class _Connection(HttpToolsProtocol):
    """Cuts a client that doesn't finish a header, or doesn't take what is written to it, within
    `limits.patience` seconds; refuses headers and connections past their limits."""

    limits: Limits

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._served = self.app
        self._reading: Timer | None = None  # while a header is incomplete
        self._writing: Timer | None = None  # while written bytes aren't taken
        self._header_bytes = 0
        self._out = JoinedWrites(self.loop)
        self._discarded: int | None = None  # bytes, once nothing more is read
        self._lingering: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._out.transport = transport
        if len(self.connections) > self.limits.connections:
            _answer(transport, "503 Service Unavailable", "too many connections", "retry-after: 5")
            transport.close()
        else:
            self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._reading)
        _cancel(self._writing)
        _cancel(self._lingering)
        super().connection_lost(exc)

    # -- reading ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_header()

    def on_headers_complete(self) -> None:
        _cancel(self._reading)
        self._reading = None
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        fits = size <= self.limits.header_bytes and len(self.headers) <= self.limits.headers
        self.app = self._served if fits else _header_too_large
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = cast(asyncio.Transport, self._out)

    def data_received(self, data: bytes) -> None:
        if self._discarded is not None:
            self._discarded += len(data)
            if self._discarded > _LINGER_BYTES:
                self.transport.abort()
            return
        if self._reading is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._reading is not None and self._header_bytes > self.limits.header_bytes:
            self._cut("431 Request Header Fields Too Large", "the request's header is too large")

    def _expect_header(self) -> None:
        if self._reading is None:
            self._header_bytes = 0
            self._reading = self._later(self._header_late)

    def _header_late(self) -> None:
        self._reading = None
        if self._header_bytes:
            self._cut("408 Request Timeout", "the request's header took too long")
        elif self.cycle is None or self.cycle.response_complete:
            self._out.close()

    def _cut(self, status: str, message: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            _answer(self._out, status, message)
            self._linger()
        else:  # an answer to an earlier request is under way
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        _answer(self._out, "400 Bad Request", msg)
        self._linger()

    def _linger(self) -> None:
        """Close when the client does: with what it sends left unread, a close is a reset to it, by
        which it can lose the answer."""
        _cancel(self._reading)
        self._reading = None
        self._discarded = 0
        self._out.flush()
        self.transport.write_eof()
        self._lingering = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    # -- writing ------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self._later(self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._writing)
        self._writing = None

    def shutdown(self) -> None:
        self._out.flush()
        super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        waited = self.timeout_keep_alive_task
        if waited is not None and overslept(self.loop, waited.when()):
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            return
        super().timeout_keep_alive_handler()
        if self._writing is None:  # closing waits for the client to take the rest
            self._writing = self._later(self.transport.abort)

    def _later(self, work: Callable[[], None]) -> Timer:
        """Has `work` done when the client's time is over."""
        return Timer(self.loop, self.limits.patience, work)


class JoinedWrites:
    """A transport whose writes of one turn of the loop go out as one, at its end.

    An answer's header and body are two, as are a stream's last events. And the events of all
    streams that are ready together go out together: each write wakes a client, which would take
    the core or its caches in between.

    transport: of which it is; set before anything is written.
    """

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size >= _LARGE:
            self.flush()

    def flush(self) -> None:
        """Write what there is now."""
        parts, size = self._parts, self._size
        self._parts, self._size = [], 0
        if not parts or self.transport.is_closing():
            return
        if len(parts) == 1:
            self.transport.write(parts[0])
        elif size < _LARGE:
            self.transport.write(b"".join(parts))
        else:  # isn't copied
            self.transport.writelines(parts)

    def close(self) -> None:
        self.flush()
        self.transport.close()

    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


async def _header_too_large(scope: Scope, receive: Receive, send: Send) -> None:
    message = "the request's header is too large; send fewer and shorter fields and a shorter URL"
    send = lingering(receive, send)
    await send_error(send, 431, message, "invalid_request_error", {"connection": "close"})


def lingering(receive: Receive, send: Send) -> Send:
    """A `send` for an answer of one piece to a request whose body isn't read: what the client sends
    of it is read and dropped for a while, as a close before would reset its connection."""

    async def lingering_send(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                await _discard(receive)
        await send({"type": "http.response.body"})

    return lingering_send


async def _discard(receive: Receive) -> None:
    discarded = 0
    while discarded <= _LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        discarded += len(message.get("body", b""))


def _answer(
    transport: "asyncio.Transport | JoinedWrites", status: str, message: str, *fields: str
) -> None:
    """Write a whole answer to a request that isn't there in full."""
    lines = [f"HTTP/1.1 {status}", "content-type: text/plain; charset=utf-8", *fields]
    lines += [f"content-length: {len(message)}", "connection: close", "", message]
    transport.write("\r\n".join(lines).encode())


def _cancel(timer: Timer | asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def allow_files(connections: int) -> None:
    """Raise this process's soft limit of open files, as far as the hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
