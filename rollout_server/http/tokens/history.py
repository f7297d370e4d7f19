"""Which earlier answer a conversation goes on from, told by what its messages say.

Each answer is kept under a hash of all messages up to and including it, and of what else the
template was given. Two messages are the same if the template, or an agent's client that sends them
back, can't mean a difference: white space around an answer, the JSON of a tool call's arguments,
ids of calls, and fields that aren't part of the conversation don't count.
"""

import hashlib
import json
import marshal
from collections.abc import Sequence
from typing import Any

from rollout_server.http.tokens.splice import Message, text_of
from rollout_server.trajectories.leading import shared

_NONE = object()  # no request yet


class History:
    """Of one session, or of the last answers of a server; keeps a value for each answer.

    size: bytes of all messages that were hashed, each once for every conversation that has it.
    """

    def __init__(self, limit: int | None = None):
        """limit: number of answers; older ones are forgotten."""
        self._limit = limit
        self.size = 0
        self._answers: dict[bytes, Any] = {}
        self._messages: list[Message] = []  # of the last request, with the hash after each
        self._hashes: list[bytes] = []
        self._template: Any = _NONE

    def add(self, template: Any, messages: Sequence[Message], answer: Message, value: Any) -> None:
        """Keep `value` for an answer to `messages`."""
        self._answers[self._next(self._chain(template, messages)[-1], answer)] = value
        if self._limit is not None and len(self._answers) > self._limit:
            del self._answers[next(iter(self._answers))]

    def find(self, template: Any, messages: Sequence[Message]) -> tuple[int, Any] | None:
        """(index, value) of the latest answer in `messages` that was given to those before it."""
        chain = self._chain(template, messages)
        for at in range(len(messages) - 1, -1, -1):
            if messages[at].get("role") == "assistant" and chain[at + 1] in self._answers:
                return at, self._answers[chain[at + 1]]
        return None

    def _chain(self, template: Any, messages: Sequence[Message]) -> list[bytes]:
        """The hash before each message, and after the last. A request mostly goes on from the one
        before, of which nothing is hashed again."""
        if template != self._template:
            seed = hashlib.blake2b(repr(template).encode(), digest_size=16).digest()
            self._template, self._messages, self._hashes = template, [], [seed]
        same = shared(self._messages, messages)
        del self._messages[same:], self._hashes[same + 1 :]
        for message in messages[same:]:
            self._messages.append(message)
            self._hashes.append(self._next(self._hashes[-1], message))
        return list(self._hashes)

    def _next(self, before: bytes, message: Message) -> bytes:
        written = _written(_said(message))
        self.size += len(written)
        return hashlib.blake2b(before + written, digest_size=16).digest()


def _written(said: list[Any]) -> bytes:
    """For long texts much faster than JSON, which only objects need: for their names' order."""
    if all(x is None or isinstance(x, str) for x in said):
        return marshal.dumps(said, 2)
    return json.dumps(said, sort_keys=True, default=str).encode()


def _said(message: Message) -> list[Any]:
    role, content = message.get("role"), text_of(message.get("content"))
    if role != "assistant":
        return [role, content, message.get("name"), message.get("tool_call_id")]
    calls = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    called = [[f.get("name"), _arguments(f)] for f in calls] or None
    return [role, content.strip(), called]


def _arguments(function: dict[str, Any]) -> Any:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments  # kept verbatim, whatever it is
    return arguments
