"""Generation for the other ranks of a group: a socket on the first rank's loop.

It has no name in the file system (it ends with its process) and takes only processes of the same
user; what it reads is pickled, as between `multiprocessing`'s own. One connection is one request;
if its rank goes away, so does the generation.
"""

import asyncio
import contextlib
import os
import pickle
import secrets
import socket
import struct
from typing import Any

from rollout_server.concurrency.race import Preempted, run_until
from rollout_server.engine.engine import Engine
from rollout_server.errors import EngineDeadError, RolloutServerError

_LENGTH = struct.Struct("!Q")
_USER = struct.Struct("3i")  # process, user and group id of the other end
_WAITING = 4096  # connections


class Relay:
    """Takes the group's prompts. Made by `open`, on the loop of the engine."""

    def __init__(self, engine: Engine, address: str):
        self.address = address
        self._engine = engine
        self._server: asyncio.Server | None = None

    @classmethod
    async def open(cls, engine: Engine) -> "Relay":
        self = cls(engine, f"rollout_server-{secrets.token_hex(16)}")
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"\0{self.address}")
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, backlog=_WAITING)
        return self

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            sock = writer.get_extra_info("socket")
            told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _USER.size)
            if _USER.unpack(told)[1] != os.getuid():
                return
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, Preempted):
                request = await _read(reader)
                answer = await run_until(lambda: reader.read(1), self._answer(*request))
                await _write(writer, answer)
        finally:
            writer.close()

    async def _answer(self, *request: Any) -> tuple[list[Any] | None, RolloutServerError | None]:
        try:
            return await self._engine.generate(*request), None
        except RolloutServerError as error:
            return None, error
        except Exception as error:
            return None, RolloutServerError(f"{type(error).__name__}: {error}")


async def relayed(address: str, request: tuple[Any, ...]) -> list[Any]:
    """What the engine at the other end generates for `request`, `Engine.generate`'s arguments."""
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, f"\0{address}")
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        try:
            await _write(writer, request)
            answer: tuple[list[Any], RolloutServerError | None] = await _read(reader)
        finally:
            writer.close()
    except (asyncio.IncompleteReadError, OSError) as gone:
        raise EngineDeadError(
            "the rank that holds this group's engine has closed it or ended; look at its output"
        ) from gone
    outputs, error = answer
    if error is not None:
        raise error
    return outputs


async def _write(writer: asyncio.StreamWriter, value: Any) -> None:
    data = pickle.dumps(value)
    writer.write(_LENGTH.pack(len(data)) + data)
    await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))
