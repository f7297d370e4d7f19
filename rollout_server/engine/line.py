"""A sync's way to the engine core past vLLM's sockets; worker/line.py is its other end."""

import asyncio
import os
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.errors import WeightSyncError
from rollout_server.weights.wire import LENGTH_BYTES, LINE_BYTES, LineAnswer, LineCall, pack, unpack

_READ = 1 << 16


class Line:
    """Two pipes. Used on the server's loop; one call at a time."""

    def __init__(self, calls: int, answers: int):
        """calls: where they are written to; answers: where they are read from."""
        self._calls, self._answers = calls, answers
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._heard = bytearray()
        self._waiting: asyncio.Future[LineAnswer] | None = None
        self._loop.add_reader(answers, self._hear)

    @classmethod
    async def open(cls, client: Any) -> "Line | None":
        """To the core of vLLM's `AsyncLLM`; None where it may not open this process's pipes, as in
        some containers."""
        theirs, calls = os.pipe()
        answers, theirs_too = os.pipe()
        try:
            await compat.listen(client, os.getpid(), theirs, theirs_too)
        except Exception:
            os.close(calls)
            os.close(answers)
            return None
        finally:
            os.close(theirs)
            os.close(theirs_too)
        os.set_blocking(answers, False)
        return cls(calls, answers)

    async def call(self, message: bytes | None, version: str) -> list[bytes] | None:
        """The workers' reports; None, and nothing was done, if the message is too long. One that
        ends in the middle never returns: who waits looks whether the engine lives."""
        self._number += 1
        packed = pack(LineCall(self._number, message, version))
        if len(packed) > LINE_BYTES:
            return None
        self._waiting = self._loop.create_future()
        os.write(self._calls, packed)
        answer = await self._waiting
        if answer.error:
            raise WeightSyncError(f"the engine couldn't take the weights: {answer.error}")
        return answer.reports

    def close(self) -> None:
        """Once. The core's thread at the other end ends with it."""
        self._loop.remove_reader(self._answers)
        os.close(self._calls)
        os.close(self._answers)

    def _hear(self) -> None:
        try:
            said = os.read(self._answers, _READ)
        except BlockingIOError:
            return
        if not said:  # the engine has ended
            self._loop.remove_reader(self._answers)
            return
        self._heard += said
        while (end := self._end()) is not None:
            answer = unpack(bytes(self._heard[LENGTH_BYTES:end]), LineAnswer)
            del self._heard[:end]
            # One that nobody waited for any longer may come late.
            if answer.number == self._number and self._waiting and not self._waiting.done():
                self._waiting.set_result(answer)

    def _end(self) -> int | None:
        """Of the first answer; None until it is there as a whole."""
        end = LENGTH_BYTES + int.from_bytes(self._heard[:LENGTH_BYTES], "little")
        return end if len(self._heard) >= end and len(self._heard) > LENGTH_BYTES else None
