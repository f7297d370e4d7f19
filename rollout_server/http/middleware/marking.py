"""What becomes of an answer on its way out: it is marked, and recorded when it is whole."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Message, Send

from rollout_server.http import routes
from rollout_server.http.dialects.messages import Stream, message_of
from rollout_server.http.middleware.marks import Marks
from rollout_server.http.retries import Copy
from rollout_server.http.routes import CHAT, COMPLETIONS, CONVERSATIONS
from rollout_server.http.sessions import Live
from rollout_server.http.tokens.calls import Call, digest
from rollout_server.http.tokens.history import History

VERSION_HEADER = b"x-policy-version"
# How an event tells that a choice ends, as vLLM's JSON and Python's have it.
_ENDS = b'"finish_reason":"', b'"finish_reason": "'
_BY_CHOICE = frozenset((CHAT, COMPLETIONS))  # whose events tell the end so
_UNREAD = 64  # events


class MarkedAnswer:
    """Passes the app's answer on, marked, and records it when it is whole: before the client has
    the end of it, which may be all that it waits for.

    good: whether it came to its end without an error, and was recorded if it is a session's.
    """

    def __init__(
        self,
        path: str,
        request: dict[str, Any],
        call: Call,
        live: Live | None,
        answered: History,
        send: Send,
        version: Callable[[], int],
        copy: Copy | None,
    ) -> None:
        """answered: where answers outside of sessions are remembered; version: the policy's; copy:
        what it is remembered in, of a session's."""
        self._path, self._call, self._live, self._answered = path, call, live, answered
        self._send, self._version, self._copy = send, version, copy
        self._marks = Marks(path, request, call, version)
        # What the next turn's history has of it.
        self._stream = Stream(path) if live is not None or self._marks.with_tokens else None
        self._take: Callable[[Message], Awaitable[None]] = self._begin
        self._start: Message = {}
        self._pending = b""
        self._unread: list[bytes] = []  # events
        self._recorded = self._complete = self._failed = False

    @property
    def good(self) -> bool:
        ends = {sample.finish_reason for sample in self._marks.samples()}
        return self._complete and not self._failed and ends.isdisjoint(("abort", "error"))

    def send(self, message: Message) -> Awaitable[None]:
        """A message of the answer, in order."""
        return self._take(message)

    async def _begin(self, message: Message) -> None:
        """What it is going to be, by its header."""
        version = str(self._version()).encode()
        message = {**message, "headers": [*message["headers"], (VERSION_HEADER, version)]}
        kind = dict(message["headers"]).get(b"content-type", b"")
        streams = kind.startswith(b"text/event-stream")
        generates = ("POST", self._path) in routes.GENERATES
        if message["status"] != 200 or not generates or not (streams or b"json" in kind):
            self._take = self._send  # as it is, and it isn't remembered
            await self._send(message)
        elif not streams:
            self._take = self._body
            self._start = message  # until the body's length is known
        else:
            # The version is put in front; what it says is read later, several events at once.
            by_choice = self._stream is None or self._path in _BY_CHOICE
            self._take = self._spliced if by_choice else self._events
            await self._out(message)

    def _out(self, message: Message) -> Awaitable[None]:
        if self._copy is not None and self._copy.add(message):
            return self._packing(self._copy, message)
        return self._send(message)

    async def _packing(self, copy: Copy, message: Message) -> None:
        await copy.pack()
        await self._send(message)

    # -- one that comes as a whole ------------------------------------------------------------

    async def _body(self, message: Message) -> None:
        self._pending += message.get("body", b"")
        if message.get("more_body", False):
            return
        body, answer = self._pending, None
        if self._marks.with_tokens or (self._live is not None and self._path in CONVERSATIONS):
            answer = _parsed(body)
            self._record(message_of(self._path, answer))
        elif self._live is not None:
            self._record(None)
        body = self._marks.body(body, answer)
        headers = [
            (k, str(len(body)).encode() if k == b"content-length" else v)
            for k, v in self._start["headers"]
        ]
        await self._out({**self._start, "headers": headers})
        await self._out({"type": "http.response.body", "body": body})
        self._complete = True

    # -- one that streams ---------------------------------------------------------------------

    def _spliced(self, message: Message) -> Awaitable[None]:
        """No coroutine of its own: there are many messages."""
        body = message.get("body", b"")
        if self._pending or not _is_plain(body) or not message.get("more_body"):
            return self._events(message)
        if self._stream is not None:
            self._unread.append(body)
            if len(self._unread) == _UNREAD:
                self._read(self._stream)
        spliced = {
            "type": "http.response.body",
            "body": self._marks.opening + body[7:],
            "more_body": True,
        }
        return self._out(spliced)

    def _read(self, stream: Stream) -> None:
        """What was spliced, and not looked at."""
        unread, self._unread = self._unread, []
        for body in unread:
            self._failed = stream.add_chunk(body[6:-2]) or self._failed

    async def _events(self, message: Message) -> None:
        """Events end with an empty line; half an event waits for its other half."""
        if self._stream is not None:
            self._read(self._stream)
        body, more = self._pending + message.get("body", b""), message.get("more_body", False)
        at = body.rfind(b"\n\n") + 2 if more else len(body)
        body, self._pending = (body[:at], body[at:]) if at >= 2 else (b"", body)
        lines = [self._line(line) for line in body.split(b"\n")]
        if not self._recorded and not self._failed and (not more or self._ended()):
            self._record(self._stream.message if self._stream is not None else None)
        if body or not more:
            await self._out({**message, "body": b"\n".join(lines)})
        self._complete = not more

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        event = line[6:]
        ends = _ENDS[0] in event or _ENDS[1] in event
        if self._stream is None and not ends:
            return self._marks.event(event)
        parsed = _parsed(event)
        self._failed = self._failed or _tells_error(parsed)
        if self._stream is not None:
            self._stream.add(parsed)
        return self._marks.last_event(event, parsed) if ends else self._marks.event(event)

    # -- the record ---------------------------------------------------------------------------

    def _ended(self) -> bool:
        """Whether a stream of one answer has told its end."""
        generations = self._call.generations
        one = len(generations) == 1 and len(generations[0].samples) == 1
        return one and self._stream is not None and self._stream.ended and self._sampled()

    def _sampled(self) -> bool:
        samples = [s for g in self._call.generations for s in g.samples.values()]
        return bool(samples) and all(s.finish_reason is not None for s in samples)

    def _record(self, answer: dict[str, Any] | None) -> None:
        """Whole answers only: a client that goes away has no answer that it could go on from."""
        call, live = self._call, self._live
        if live is not None and live.session.ended:
            return  # while it was answered
        if live is not None and self._sampled():
            for generation in call.generations:
                sample = generation.samples[0]
                last = generation is call.generations[-1]
                node = live.session.record(
                    generation.prompt_ids,
                    sample.ids,
                    sample.logprobs,
                    versions=sample.versions,
                    finish_reason=sample.finish_reason,
                    messages=call.messages,
                    answer=answer if last else None,
                    masked=generation.masked,
                    unmasked=sample.unmasked,
                )
                if last and answer is not None:
                    live.history.add(call.template, call.messages, answer, node)
        elif self._marks.with_tokens and answer is not None and self._sampled():
            generation = call.generations[-1]
            tokens = digest([*generation.prompt_ids, *generation.samples[0].ids])
            self._answered.add(call.template, call.messages, answer, tokens)
        self._recorded = True


def _is_plain(body: bytes) -> bool:
    """Whether it is one whole event, with which no choice ends."""
    return (
        body.startswith(b'data: {"')
        and body.find(b"\n") == len(body) - 2
        and body.endswith(b"\n\n")
        and _ENDS[0] not in body
        and _ENDS[1] not in body
    )


def _parsed(event: bytes) -> Any:
    """vLLM's own JSON: it needs no checks, and msgspec reads it in a tenth of the time."""
    try:
        return msgspec.json.decode(event)
    except msgspec.DecodeError:  # NaN, for one
        return json.loads(event)


def _tells_error(event: dict[str, Any]) -> bool:
    """Whether an event says that there won't be a whole answer; each dialect has its own way."""
    return bool(event.get("error")) or event.get("type") in ("error", "response.failed")
