"""The layer in front of vLLM's app in which requests become calls (see calls.py).

On the way in, what the request tells of earlier answers' tokens is checked; on the way out, the
answer is marked: the header `x-policy-version` and the field `policy_version` (of the JSON body, or
of each event of a stream) tell the newest version that may have sampled a token of it,
`policy_versions`, per choice, which version sampled which tokens. Where log-probabilities or token
ids were asked for, a chat answer's message carries its tokens. In a session the call is recorded.
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from rollout_server.http import routes
from rollout_server.http.answers import CHAT, CONVERSATIONS, Stream, message_of
from rollout_server.http.body import apart
from rollout_server.http.calls import Call, Sample, current
from rollout_server.http.errors import send_error
from rollout_server.http.history import History
from rollout_server.http.intake import BODY, REQUEST, SIZE
from rollout_server.http.options import NAMES, Options
from rollout_server.http.retries import Copy, Retries
from rollout_server.http.seen import note
from rollout_server.http.sessions import SESSION, Live
from rollout_server.http.splice import Known
from rollout_server.http.tokens import BadRequest, carried, with_tokens
from rollout_server.lifecycle.gate import Gate

VERSION_HEADER = b"x-policy-version"
_COMPLETIONS = "/v1/completions"
_TOLD = 8192  # answers
_RENDERS = routes.GENERATES | {("POST", "/tokenize")}
_OURS = frozenset(NAMES)
# How an event tells that a choice ends, as vLLM's JSON and Python's have it.
_ENDS = b'"finish_reason":"', b'"finish_reason": "'
_BY_CHOICE = frozenset((CHAT, _COMPLETIONS))  # whose events tell the end so
_UNREAD = 64  # events


class Calls:
    """Only for requests that render or sample; others pass."""

    def __init__(
        self, app, gate: Gate, version: Callable[[], int], vocabulary: int,
        sampling: Mapping[str, Any], retries: Retries,
    ):  # fmt: skip
        """version: the policy's; vocabulary: number of token ids; sampling: defaults of the
        sampling fields; retries: where answers of sessions are remembered."""
        self._app = app
        self._gate = gate
        self._version = version
        self._temperature = sampling.get("temperature")
        self._vocabulary = vocabulary
        self._retries = retries
        # What was answered outside of sessions: a client that sends tokens back is compared with.
        self._told = History(limit=_TOLD)

    async def __call__(self, scope, receive, send):
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
        answer = _Answer(scope["path"], request, call, live, self._told, send, self._version)
        if live is None:
            await self._pass_on(scope, receive, answer, request)
            return
        name, session = await apart(scope[SIZE], _name, scope), live.session.id
        if _may_repeat(scope) and (before := await self._retries.find(session, name)):
            for message in before:
                await send(message)
            return
        answer.copy = copy = self._retries.copy()
        try:
            await self._pass_on(scope, receive, answer, request)
            if answer.good:
                self._retries.keep(session, name, copy)
        finally:
            if not answer.good:
                copy.drop()
            if live.ending.happened:  # meanwhile
                self._retries.forget(session)

    async def _pass_on(self, scope, receive, answer: "_Answer", request: dict[str, Any]) -> None:
        call = answer.call
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
        options = Options.of(path, request, live, self._temperature)
        told = carried(request, self._vocabulary)
        if live is not None and request.get("n") not in (None, 1):
            raise BadRequest(
                f"n={request['n']!r}: a session's conversation goes on from one answer; send n=1, "
                "or several requests"
            )

        def known(messages, template) -> Known | None:
            if live is not None and (found := live.history.find(template, messages)):
                at, node = found
                return Known(at, *live.session.tree.tokens(node))
            if told is None:
                return None
            ours = self._told.find(template, messages)
            tokens = _digest([*told.prompt_ids, *told.ids])
            call.carried = ours is None or ours != (told.at, tokens)
            return told

        call = Call(
            self._version, known, self._gate, options,
            with_logprobs=live is not None or _asks(request),
            own_length=request.get("max_tokens") is not None,
            silent=path == _COMPLETIONS and request.get("max_tokens") == 0,
            must_see=path in CONVERSATIONS and (live is not None or told is not None),
        )  # fmt: skip
        return call


class _Answer:
    """Passes the app's answer on, marked, and records it when it is whole: before the client has
    the end of it, which may be all that it waits for.

    good: whether it came to its end without an error, and was recorded if it is a session's.
    copy: what it is remembered in, of a session's.
    """

    def __init__(
        self, path: str, request: dict[str, Any], call: Call, live: Live | None, told: History,
        send: Callable, version: Callable[[], int],
    ):  # fmt: skip
        self._path, self.call, self._live, self._told_before = path, call, live, told
        self._send, self._version = send, version
        self._with_tokens = _asks(request) and path == CHAT
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
        if self._path != _COMPLETIONS:  # there each is of a prompt, here of a step to the answer
            generations = generations[-1:]
        return [g.samples[at] for g in generations for at in sorted(g.samples)]

    def _sample(self, choice: dict[str, Any]) -> Sample | None:
        """That of a choice, once it is whole."""
        number, generations = choice.get("index", 0), self.call.generations
        prompt, at = divmod(number, self._each) if self._path == _COMPLETIONS else (-1, number)
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
            tokens = _digest([*generation.prompt_ids, *generation.samples[0].ids])
            self._told_before.add(call.template, call.messages, answer, tokens)
        self._recorded = True


def _asks(request: dict[str, Any]) -> bool:
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


def _digest(ids: list[int]) -> bytes:
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def _name(scope) -> bytes:
    """Of the call that a request is: an SDK's retry has the same."""
    told = dict(scope["headers"]).get(b"idempotency-key")
    said = scope["path"].encode() + b"\n" + scope[BODY]
    return told or hashlib.blake2b(said, digest_size=16).digest()


def _may_repeat(scope) -> bool:
    headers = dict(scope["headers"])
    return headers.get(b"x-stainless-retry-count", b"0") != b"0" or b"idempotency-key" in headers
