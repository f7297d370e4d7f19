"""What becomes of an answer on its way out: it is marked, and recorded when it is whole."""

import json
from collections.abc import Callable
from typing import Any

import msgspec

from rollout_server.http import routes
from rollout_server.http.dialects.messages import Stream, message_of
from rollout_server.http.retries import Copy
from rollout_server.http.routes import CHAT, COMPLETIONS
from rollout_server.http.sessions import Live
from rollout_server.http.tokens.calls import Call, Sample, digest
from rollout_server.http.tokens.fields import with_tokens
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
    copy: what it is remembered in, of a session's.
    """

    def __init__(
        self, path: str, request: dict[str, Any], call: Call, live: Live | None, answered: History,
        send: Callable, version: Callable[[], int],
    ):  # fmt: skip
        self._path, self.call, self._live, self._answered = path, call, live, answered
        self._send, self._version = send, version
        self._with_tokens = asks(request) and path == CHAT
        n = request.get("n")
        self._each = n if type(n) is int and n > 0 else 1  # answers to a prompt
        self._start: dict | None = None
        self._pending = b""
        self._streams = self._splices = self._passes = self._recorded = False
        self._complete = self._failed = False
        self._stream = Stream(path) if live is not None or self._with_tokens else None
        self._unread: list[bytes] = []  # events
        self._mark: tuple[int | None, bytes] = None, b""  # of the last event
        self.copy: Copy | None = None

    @property
    def good(self) -> bool:
        ends = {sample.finish_reason for sample in self._samples()}
        return self._complete and not self._failed and ends.isdisjoint(("abort", "error"))

    async def send(self, message: dict) -> None:
        if self._splices and message.get("more_body") and not self._pending:
            body = message.get("body", b"")
            if _is_plain(body):
                if self._stream is not None:
                    self._unread.append(body)
                    if len(self._unread) == _UNREAD:
                        self._read()
                await self._out({**message, "body": self._opened() + body[7:]})
                return
        if message["type"] == "http.response.start":
            version = str(self._version()).encode()
            message = {**message, "headers": [*message["headers"], (VERSION_HEADER, version)]}
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            generates = ("POST", self._path) in routes.GENERATES
            marked = message["status"] == 200 and generates and (self._streams or b"json" in kind)
            self._passes = not marked
            # The version is put in front; what it says is read later, several events at once.
            self._splices = (
                marked and self._streams and (self._stream is None or self._path in _BY_CHOICE)
            )
            if self._streams or self._passes:
                await self._out(message)
            else:
                self._start = message  # until the body's length is known
        elif message["type"] != "http.response.body" or self._passes:
            await self._out(message)
        elif self._streams:
            await self._events(message)
        else:
            await self._body(message)

    async def _out(self, message: dict) -> None:
        await self._send(message)
        if self.copy is not None and not self._passes:
            await self.copy.add(message)

    async def _body(self, message: dict) -> None:
        self._pending += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._pending
        if self._with_tokens or self._live is not None:
            answer = _parsed(body)
            self._record(message_of(self._path, answer))
            if self._with_tokens and self.call.generations:
                body = json.dumps(self._with_its_tokens(answer)).encode()
        body = self._marked(body, self._samples())
        headers = [
            (k, str(len(body)).encode() if k == b"content-length" else v)
            for k, v in self._start["headers"]
        ]
        await self._out({**self._start, "headers": headers})
        await self._out({"type": "http.response.body", "body": body})
        self._complete = True

    async def _events(self, message: dict) -> None:
        """Events end with an empty line; half an event waits for its other half."""
        self._read()
        body, more = self._pending + message.get("body", b""), message.get("more_body", False)
        at = body.rfind(b"\n\n") + 2 if more else len(body)
        body, self._pending = (body[:at], body[at:]) if at >= 2 else (b"", body)
        lines = [self._event(line) for line in body.split(b"\n")]
        if not self._recorded and not self._failed and (not more or self._ended()):
            self._record(self._stream.message if self._stream is not None else None)
        if body or not more:
            await self._out({**message, "body": b"\n".join(lines)})
        self._complete = not more

    def _read(self) -> None:
        """What was spliced, and not looked at."""
        unread, self._unread = self._unread, []
        for body in unread:
            event = _parsed(body[6:-2])
            self._failed = self._failed or _tells_error(event)
            self._stream.add(event)

    def _opened(self) -> bytes:
        """How an event begins that has fields of its own."""
        version = self._version()
        if self._mark[0] != version:
            self._mark = version, b'data: {"policy_version": %d, ' % version
        return self._mark[1]

    def _event(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        event, samples = line[6:], []
        ends = _ENDS[0] in event or _ENDS[1] in event
        if self._stream is not None or ends:
            parsed = _parsed(event)
            self._failed = self._failed or _tells_error(parsed)
            if self._stream is not None:
                self._stream.add(parsed)
            if ends:
                # The engine may be ahead of the stream: told with the event that ends a choice.
                samples = [self._sample(c) for c in _finished(parsed)]
                samples = [sample for sample in samples if sample is not None]
                if samples and self._with_tokens:
                    event = json.dumps(self._with_its_tokens(parsed)).encode()
        if not samples and event.startswith(b'{"'):
            return self._opened() + event[1:]
        return b"data: " + self._marked(event, samples)

    def _ended(self) -> bool:
        """Whether a stream of one answer has told its end."""
        one = len(self.call.generations) == 1 and len(self.call.generations[0].samples) == 1
        return one and self._stream is not None and self._stream.ended and self._sampled()

    def _sampled(self) -> bool:
        samples = [s for g in self.call.generations for s in g.samples.values()]
        return bool(samples) and all(s.finish_reason is not None for s in samples)

    def _samples(self) -> list[Sample]:
        """What the answer's choices are, in their order."""
        generations = self.call.generations
        if self._path != COMPLETIONS:  # there each is of a prompt, here of a step to the answer
            generations = generations[-1:]
        return [g.samples[at] for g in generations for at in sorted(g.samples)]

    def _sample(self, choice: dict[str, Any]) -> Sample | None:
        """That of a choice, once it is whole."""
        number, generations = choice.get("index", 0), self.call.generations
        prompt, at = divmod(number, self._each) if self._path == COMPLETIONS else (-1, number)
        if prompt >= len(generations) or not generations:
            return None
        sample = generations[prompt].samples.get(at)
        return None if sample is None or sample.finish_reason is None else sample

    def _with_its_tokens(self, answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer.get("choices", ()):
            field = "delta" if "delta" in choice else "message"
            sample = self._sample(choice) if choice.get("finish_reason") else None
            if sample is not None and isinstance(choice.get(field), dict):
                prompt_ids = self.call.generations[-1].prompt_ids
                choice[field] = with_tokens(choice[field], prompt_ids, sample)
        return answer

    def _marked(self, body: bytes, samples: list[Sample]) -> bytes:
        """`{...}` -> `{"policy_version": N, ...}`, without parsing what may be long.

        samples: of the choices that are whole with it."""
        if not body.startswith(b"{"):
            return body
        marks: dict[str, Any] = {"policy_version": self._version()}
        if samples:
            marks["policy_versions"] = [
                [{"version": v, "start": a, "end": b} for v, a, b in sample.versions]
                for sample in samples
            ]
            if self.call.generations[-1].masked:
                marks["logprobs_of"] = "what the grammar allowed"
        comma = b"" if body[1:].lstrip().startswith(b"}") else b", "
        return json.dumps(marks).encode()[:-1] + comma + body[1:]

    def _record(self, answer: dict[str, Any] | None) -> None:
        """Whole answers only: a client that goes away has no answer that it could go on from."""
        call, live = self.call, self._live
        if live is not None and live.session.ended:
            return  # while it was answered
        if live is not None and self._sampled():
            for generation in call.generations:
                sample = generation.samples[0]
                last = generation is call.generations[-1]
                node = live.session.record(
                    generation.prompt_ids, sample.ids, sample.logprobs, versions=sample.versions,
                    finish_reason=sample.finish_reason, messages=call.messages,
                    answer=answer if last else None, masked=generation.masked,
                    unmasked=sample.unmasked,
                )  # fmt: skip
                if last and answer is not None:
                    live.history.add(call.template, call.messages, answer, node)
        elif self._with_tokens and answer is not None and self._sampled():
            generation = call.generations[-1]
            tokens = digest([*generation.prompt_ids, *generation.samples[0].ids])
            self._answered.add(call.template, call.messages, answer, tokens)
        self._recorded = True


def asks(request: dict[str, Any]) -> bool:
    """Whether a request asks for what its answer's tokens are."""
    return any(map(request.get, ("logprobs", "return_token_ids", "unmasked_logprobs")))


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


def _finished(event: dict[str, Any]) -> list[dict[str, Any]]:
    return [choice for choice in event.get("choices", ()) if choice.get("finish_reason")]


def _tells_error(event: dict[str, Any]) -> bool:
    """Whether an event says that there won't be a whole answer; each dialect has its own way."""
    return bool(event.get("error")) or event.get("type") in ("error", "response.failed")
