"""Answers of sessions that a client may ask for again, as an SDK does whose connection broke.

Kept as they were sent, compressed, and all together within a number of bytes: the oldest are
forgotten for newer ones.
"""

import asyncio
import functools
import threading
import zlib
from collections import OrderedDict
from typing import Any

from starlette.types import Message

_EACH = 16  # answers of a session
_OVERHEAD = 1024  # bytes that one costs besides its body: its header, and what holds it
_LARGE = 64 << 10  # bytes, from which a thread has the work
_SMALL = 32 << 10  # bytes that are packed at once: fewer than a packer takes stay as they are
# A small window: an answer under way costs 32 KiB. Events are much like those just before them.
_WINDOW, _MEMORY = 12, 5


class Retries:
    """Of all sessions, within `most` bytes. Written to on the server's loop; `forget` anywhere."""

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, bytes], Copy] = OrderedDict()
        self._of: dict[str, OrderedDict[bytes, None]] = {}  # names by session, oldest first
        self.bytes = 0

    def copy(self) -> "Copy":
        """An empty one of an answer that begins; `keep` or `drop` must follow."""
        return Copy(self)

    def keep(self, session: str, name: bytes, copy: "Copy") -> None:
        """Remember an answer that is whole, by the name of its request."""
        copy.finish()
        if copy.dropped:
            return
        with self._lock:
            self._pop(session, name)
            self._kept[session, name] = copy
            names = self._of.setdefault(session, OrderedDict())
            names[name] = None
            while len(names) > _EACH:
                self._pop(session, next(iter(names)))

    async def find(self, session: str, name: bytes) -> list[Message]:
        """The messages of an answer; none if it isn't remembered."""
        copy = self._kept.get((session, name))
        return [] if copy is None else await copy.messages()

    def forget(self, session: str) -> None:
        """All of a session's."""
        with self._lock:
            for name in list(self._of.get(session, ())):
                self._pop(session, name)

    def grow(self, copy: "Copy", size: int) -> None:
        """A copy has `size` bytes more; the oldest go for it, or else it does itself."""
        with self._lock:
            self.bytes += size
            while self.bytes > self._most and self._kept:
                self._pop(*next(iter(self._kept)))
        if self.bytes > self._most:
            copy.drop()

    def shrink(self, size: int) -> None:
        with self._lock:
            self.bytes -= size

    def _pop(self, session: str, name: bytes) -> None:
        copy = self._kept.pop((session, name), None)
        if copy is not None:
            self.bytes -= copy.size
            names = self._of[session]
            del names[name]
            if not names:
                del self._of[session]


class Copy:
    """Of one answer. `size`: bytes that it holds; `dropped`: it holds none any more."""

    def __init__(self, retries: Retries):
        self._retries = retries
        self._start: Message | None = None
        self._parts: list[bytes] = []  # packed, where there is a packer
        self._loose: list[bytes] = []  # that came since
        self._loose_bytes = 0
        self._packer: Any = None
        self._packed = False
        self.size = 0
        self.dropped = False
        self._grow(_OVERHEAD)

    def add(self, message: Message) -> bool:
        """A message of the answer, in order; whether `pack` must follow."""
        if self.dropped:
            return False
        if message["type"] == "http.response.start":
            self._start = message
        elif body := message.get("body", b""):
            self._loose.append(body)
            self._loose_bytes += len(body)
        return self._loose_bytes >= _SMALL

    async def pack(self) -> None:
        """Take less room for what came."""
        if self._loose_bytes >= _LARGE:
            await asyncio.to_thread(self._pack)
        else:
            self._pack()

    def finish(self) -> None:
        """The answer is whole. One that is small isn't packed: it would hardly be smaller."""
        if not self.dropped and self._packer is not None:
            self._pack()
            self._put(self._packer.flush())
        elif not self.dropped:
            self._put(b"".join(self._loose))
        if not self.dropped:
            self._packed = self._packer is not None
            self._parts, self._loose, self._packer = [b"".join(self._parts)], [], None

    def drop(self) -> None:
        """Hold nothing, and take nothing any more."""
        if not self.dropped:
            self.dropped, self._parts, self._loose, self._packer = True, [], [], None
            self._retries.shrink(self.size)

    async def messages(self) -> list[Message]:
        (body,) = self._parts
        if self._packed:
            large = len(body) > _LARGE // 8
            unpack = functools.partial(zlib.decompress, body, _WINDOW)
            body = await asyncio.to_thread(unpack) if large else unpack()
        assert self._start is not None  # it is whole
        return [self._start, {"type": "http.response.body", "body": body}]

    def _pack(self) -> None:
        loose, self._loose, self._loose_bytes = b"".join(self._loose), [], 0
        packer = self._packer or zlib.compressobj(1, zlib.DEFLATED, _WINDOW, _MEMORY)
        self._packer = packer
        self._put(packer.compress(loose))

    def _put(self, part: bytes) -> None:
        if part and not self.dropped:
            self._parts.append(part)
            self._grow(len(part))

    def _grow(self, size: int) -> None:
        self.size += size
        self._retries.grow(self, size)
