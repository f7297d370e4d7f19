"""Answers of sessions that a client may ask for again, as an SDK does whose connection broke.

Kept as they were sent, compressed, and all together within a number of bytes: the oldest are
forgotten for newer ones.
"""

import asyncio
import threading
import zlib
from collections import OrderedDict
from typing import Any

_EACH = 16  # answers of a session
_OVERHEAD = 1024  # bytes that one costs besides its body: its header, and what holds it
_LARGE = 64 << 10  # bytes, from which a thread has the work
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

    async def find(self, session: str, name: bytes) -> list[dict[str, Any]]:
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
        self._start: dict[str, Any] | None = None
        self._parts: list[bytes] = []
        self._packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOW, _MEMORY)
        self.size = 0
        self.dropped = False
        self._grow(_OVERHEAD)

    async def add(self, message: dict[str, Any]) -> None:
        """A message of the answer, in order."""
        if self.dropped:
            return
        if message["type"] == "http.response.start":
            self._start = message
        elif body := message.get("body", b""):
            pack = self._packer.compress
            self._put(pack(body) if len(body) < _LARGE else await asyncio.to_thread(pack, body))

    def finish(self) -> None:
        """The answer is whole."""
        if not self.dropped:
            self._put(self._packer.flush())
        if not self.dropped:
            self._packer, self._parts = None, [b"".join(self._parts)]

    def drop(self) -> None:
        """Hold nothing, and take nothing any more."""
        if not self.dropped:
            self.dropped, self._parts, self._packer = True, [], None
            self._retries.shrink(self.size)

    async def messages(self) -> list[dict[str, Any]]:
        (packed,) = self._parts
        work = zlib.decompress, packed, _WINDOW
        body = await asyncio.to_thread(*work) if len(packed) > _LARGE // 8 else work[0](*work[1:])
        return [self._start, {"type": "http.response.body", "body": body}]

    def _put(self, part: bytes) -> None:
        if part and not self.dropped:
            self._parts.append(part)
            self._grow(len(part))

    def _grow(self, size: int) -> None:
        self.size += size
        self._retries.grow(self, size)
