"""What an answer is marked with: which version of the weights sampled which of its tokens.

The field `policy_version` of a JSON body, or of each event of a stream, is the newest version that
may have sampled a token of it; `policy_versions` tells, per choice, which version sampled which
tokens. Where log-probabilities or token ids were asked for, a chat answer's message carries its
tokens.
"""

import json
from collections.abc import Callable
from typing import Any

from rollout_server.http.routes import CHAT, COMPLETIONS
from rollout_server.http.tokens.calls import Call, Sample
from rollout_server.http.tokens.fields import with_tokens


class Marks:
    """Of one call's answer.

    with_tokens: whether its messages carry their tokens.
    """

    def __init__(
        self, path: str, request: dict[str, Any], call: Call, version: Callable[[], int]
    ) -> None:
        """version: the policy's."""
        self._path, self._call, self._version = path, call, version
        n = request.get("n")
        self._each = n if type(n) is int and n > 0 else 1  # answers to a prompt
        self._opening: tuple[int | None, bytes] = None, b""  # of the last event
        self.with_tokens = asks(request) and path == CHAT

    def body(self, body: bytes, answer: Any) -> bytes:
        """Of an answer that isn't streamed. answer: the JSON in it, where that is read already."""
        if self.with_tokens and self._call.generations:
            body = json.dumps(self._with_its_tokens(answer)).encode()
        return self._marked(body, self.samples())

    @property
    def opening(self) -> bytes:
        """How an event begins that has fields of its own, in the place of `data: {`."""
        version = self._version()
        if self._opening[0] != version:
            self._opening = version, b'data: {"policy_version": %d, ' % version
        return self._opening[1]

    def event(self, event: bytes) -> bytes:
        """An event's line, of which `event` is the JSON, and with which no choice ends."""
        if event.startswith(b'{"'):
            return self.opening + event[1:]
        return b"data: " + self._marked(event, [])

    def last_event(self, event: bytes, parsed: dict[str, Any]) -> bytes:
        """The line of one with which choices may end: the engine may be ahead of the stream, so
        what is told of a choice is told with its end."""
        ended = [choice for choice in parsed.get("choices", ()) if choice.get("finish_reason")]
        samples = [sample for choice in ended if (sample := self._sample(choice)) is not None]
        if not samples:
            return self.event(event)
        if self.with_tokens:
            event = json.dumps(self._with_its_tokens(parsed)).encode()
        return b"data: " + self._marked(event, samples)

    def samples(self) -> list[Sample]:
        """What the answer's choices are, in their order."""
        generations = self._call.generations
        if self._path != COMPLETIONS:  # there each is of a prompt, here of a step to the answer
            generations = generations[-1:]
        return [g.samples[at] for g in generations for at in sorted(g.samples)]

    def _sample(self, choice: dict[str, Any]) -> Sample | None:
        """That of a choice, once it is whole."""
        number, generations = choice.get("index", 0), self._call.generations
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
                prompt_ids = self._call.generations[-1].prompt_ids
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
            if self._call.generations[-1].masked:
                marks["logprobs_of"] = "what the grammar allowed"
        comma = b"" if body[1:].lstrip().startswith(b"}") else b", "
        return json.dumps(marks).encode()[:-1] + comma + body[1:]


def asks(request: dict[str, Any]) -> bool:
    """Whether a request asks for what its answer's tokens are."""
    return any(map(request.get, ("logprobs", "return_token_ids", "unmasked_logprobs")))
