"""Messages that vLLM has read before, so that a turn costs what is new in it.

An agent sends its whole conversation each turn. Where a request begins with all messages of an
earlier one, vLLM is handed the others alone (see middleware/incremental_messages.py), and those
are put back as it left them then (see vllm_hooks.py) when the others are checked. What it makes of
a message doesn't depend on others.
"""

import hashlib
import marshal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout_server.http.tokens.splice import Message
from rollout_server.trajectories.leading import identical

_CONVERSATIONS = 4  # that an agent may have at once


@dataclass
class CachedPrefix:
    """Messages of an earlier request, as vLLM left them.

    parsed: what it makes of the first of them for a template, by format.
    """

    messages: list[Message] = field(default_factory=list)
    parsed: dict[str, list[Any]] = field(default_factory=dict)

    async def parse(
        self,
        messages: Sequence[Message],
        content_format: str,
        parse: Callable[[Sequence[Message]], Awaitable[tuple[list[Any], Any, Any]]],
    ) -> tuple[list[Any], Any, Any]:
        """What `parse` makes of messages, of which these may be the first."""
        same = identical(self.messages, messages)
        parsed = self.parsed.setdefault(content_format, [])
        known = parsed[:same]
        made, *media = await parse(messages[len(known) :])
        if len(made) != len(messages) - len(known):
            return await parse(messages)
        if len(parsed) == len(known):  # else another request has added them meanwhile
            parsed += made[: same - len(known)]
        return [*known, *made], *media


@dataclass(frozen=True)
class _Request:
    last: bytes
    hashed: Any  # all messages, by hashlib's
    left: CachedPrefix


class ParsedMessageCache:
    """Of one session: its last requests, by hashes of the messages as they came."""

    def __init__(self) -> None:
        self._requests: list[_Request] = []

    def find(self, messages: Any) -> CachedPrefix:
        """What is known of the first of `messages`: all that an earlier request had, or nothing.
        The last is never among them; `messages` may be anything."""
        for request in reversed(self._requests):
            size = len(request.left.messages)
            if (
                isinstance(messages, list)
                and size < len(messages)
                and _written(messages[size - 1]) == request.last
                and _hashed(messages[:size]).digest() == request.hashed.digest()
            ):
                return request.left
        return CachedPrefix()

    def add(self, messages: list[Any], left: list[Message], earlier: CachedPrefix) -> None:
        """Keep what vLLM left of a request's messages, which go on from `earlier`; nothing where
        it made more or less of them than there were."""
        if not left or len(messages) != len(left):
            return
        before = next((r.hashed for r in self._requests if r.left is earlier), None)
        hashed = _hashed(messages[0 if before is None else len(earlier.messages) :], before)
        kept = CachedPrefix(left, {name: list(parsed) for name, parsed in earlier.parsed.items()})
        # What the new one begins with isn't asked for again, but by a branch.
        others = [r for r in self._requests if not _begins(left, r.left.messages)]
        request = _Request(_written(messages[-1]), hashed, kept)
        self._requests = [*others, request][-_CONVERSATIONS:]


def _begins(messages: list[Message], others: list[Message]) -> bool:
    return messages[: len(others)] == others


def _hashed(messages: list[Any], before: Any = None) -> Any:
    hashed = hashlib.blake2b(digest_size=16) if before is None else before.copy()
    hashed.update(b"".join(map(_written, messages)))
    return hashed


def _written(value: Any) -> bytes:
    """A JSON value. Unlike `==` it tells 1 from true and 1.0, and the order of names."""
    return marshal.dumps(value, 2)
