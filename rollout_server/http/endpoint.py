"""An engine's endpoint: its port, the gate and the sessions, and vLLM's app behind all layers."""

import copy
import socket
from collections.abc import Callable, Mapping
from typing import Any

from rollout_server.config import RolloutConfig
from rollout_server.errors import StateError
from rollout_server.http.dialects.vllm_app import serving_app
from rollout_server.http.middleware.stack import Engine, layered
from rollout_server.http.server.limits import Limits
from rollout_server.http.server.listener import Listener, listen
from rollout_server.http.sessions import Sessions
from rollout_server.http.tokens.texts import Texts
from rollout_server.http.tokens.vllm_hooks import install_hooks
from rollout_server.lifecycle.gate import Gate
from rollout_server.observability.events import Journal
from rollout_server.observability.loop_lag import LoopWatch


class Endpoint:
    """Of one server. `open` takes the port, `start` serves; where another rank of a group has the
    engine neither is called, and there is a gate alone."""

    def __init__(self, config: RolloutConfig, key: str, journal: Journal):
        self._config = config
        self._key = key
        self._journal = journal
        self._sock: socket.socket | None = None
        self._listener: Listener | None = None
        self._watch: LoopWatch | None = None
        self.gate = Gate(config.hold_timeout, journal.metrics)
        self.sessions = Sessions(journal, config.max_retry_bytes, config.max_session_bytes)
        read = journal.metrics.read
        read("gate_held_requests", lambda: self.gate.held)
        read("sessions_open", lambda: len(self.sessions))
        read("http_connections", self._connections)

    def _connections(self) -> int:
        return 0 if self._listener is None else self._listener.connections

    @property
    def is_open(self) -> bool:
        return self._sock is not None

    def open(self, number: int, several_machines: bool) -> str:
        """Take the port of this machine's engine `number`; the URL that clients use."""
        host, port = self._config.host, self._config.port
        self._sock = listen(host, port + number if port else 0)
        if host in ("0.0.0.0", "::"):  # every address of this machine; others know it by name
            local = "127.0.0.1" if host == "0.0.0.0" else "::1"
            host = socket.gethostname() if several_machines else local
        port = self._sock.getsockname()[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    async def start(
        self,
        client: Any,
        tokenizer: Any,
        names: list[str],
        sampling: Mapping[str, Any],
        tool_parser: str | None,
        version: Callable[[], int],
    ) -> None:
        """Serve vLLM's `client`; returns when connections are accepted.

        names: of the model; sampling: defaults of the fields that a request leaves out;
        tool_parser: see `engine.arguments.tool_parser`; version: the policy's.
        """
        if self._sock is None:
            raise StateError("the endpoint has no port yet; call open() first")
        parser = self._config.reasoning_parser
        vllm = await serving_app(client, names, sampling, tool_parser, parser)
        # The trainer's tokenizer isn't thread-safe.
        texts = Texts(copy.deepcopy(tokenizer), client.model_config.max_model_len)
        install_hooks(client, vllm.state, texts)
        limits = Limits.of(self._config, client.vllm_config.scheduler_config.max_num_seqs)
        app = layered(
            vllm,
            self._key,
            self.gate,
            version,
            self.sessions,
            names,
            client.model_config.get_vocab_size(),
            sampling,
            limits,
            self._journal,
            Engine(client, texts),
        )
        self._listener = Listener(app, self._sock, limits)
        await self._listener.start()
        self._watch = LoopWatch(self._journal.metrics)

    async def close(self, patience: float) -> None:
        """Tell who waits, and cut what still runs after `patience` seconds."""
        self.gate.shut("the server is closed")
        if self._watch is not None:
            self._watch.stop()
        if self._listener is not None:
            await self._listener.close(patience)

    def free(self) -> None:
        """Give the port back, from any thread."""
        if self._sock is not None:
            self._sock.close()
