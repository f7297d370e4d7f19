"""The socket and uvicorn, on the server's loop."""

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn

from rollout_server.errors import ConfigError, PortInUseError
from rollout_server.http.server.connections import allow_files, connection_class
from rollout_server.http.server.limits import Limits


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket; `PortInUseError` or `ConfigError` tells what to change."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host={host!r} isn't an address of this machine: {error}") from error
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise PortInUseError(
            f"port={port} on host={host!r} can't be bound ({error.strerror}); "
            "give another port, or 0 for a free one"
        ) from error
    sock.set_inheritable(False)
    return sock


class Listener:
    """Serves one app on one socket until `close`."""

    def __init__(self, app: Any, sock: socket.socket, limits: Limits):
        allow_files(limits.connections)
        config = uvicorn.Config(
            app,
            http=connection_class(limits),
            ws="none",
            proxy_headers=False,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,
            server_header=False,
            backlog=4096,
        )
        self._sock = sock
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Return when connections are accepted."""
        # uvicorn installs signal handlers on the main thread only, and this isn't it.
        self._task = asyncio.create_task(self._server.serve(sockets=[self._sock]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise RuntimeError("the HTTP server ended while it started")
            await asyncio.sleep(0.005)

    async def close(self, timeout: float) -> None:
        """Stop accepting, cut what still runs after `timeout` seconds, free the port."""
        self._server.config.timeout_graceful_shutdown = max(1, round(timeout))
        self._server.should_exit = True
        if self._task is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(timeout + 1):
                    await self._task
        self._sock.close()
