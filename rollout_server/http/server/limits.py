"""How much clients may ask of the server at a time."""

from dataclasses import dataclass
from typing import Any

KIB = 1 << 10


@dataclass(frozen=True)
class Limits:
    """How much the server takes at a time, and for how long.

    body_bytes: of one request; bodies: how many of the largest may be there at a time.
    connections: open at a time. held: requests that wait, for the gate or for their turn.
    running: requests that the engine has at a time.
    patience: seconds that a client may take to send a header, to send a body, and to take what was
    written to it.
    header_bytes, headers: size and number of the lines of one header.
    """

    body_bytes: int = 16 << 20
    bodies: int = 64
    connections: int = 4096
    held: int = 4096
    running: int = 256
    patience: float = 60.0
    header_bytes: int = 64 * KIB
    headers: int = 128

    @property
    def bodies_bytes(self) -> int:
        return self.body_bytes * self.bodies

    @classmethod
    def of(cls, config: Any, sequences: int) -> "Limits":
        """config: `RolloutConfig`; sequences: how many the engine runs at a time."""
        return cls(
            body_bytes=config.max_body_bytes,
            connections=config.max_connections,
            held=config.max_held_requests,
            running=config.max_running_requests or sequences,
            patience=config.client_timeout,
        )
