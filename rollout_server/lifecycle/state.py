"""The state of a server: one enum, one owner, one table of allowed transitions.

    starting -> awake <-> closing_gate -> asleep -> waking -> syncing -> awake
                awake  -> closing_gate -> syncing -> awake
                awake and any on the way to it -> down -> waking -> syncing -> awake

`down`: the engine has died; requests wait for the next one, which `waking` starts. (One that dies
asleep stays asleep: it is started anew when it is to wake.) Any state may end in `broken`, with
restarts used up or weights half written, where only `close()` is left; and any ends in `closed`.
"""

import contextlib
import enum
import threading
from collections.abc import Iterator

from rollout_server.errors import RolloutServerError, StateError


class State(enum.StrEnum):
    STARTING = "starting"
    AWAKE = "awake"
    CLOSING_GATE = "closing_gate"
    ASLEEP = "asleep"
    WAKING = "waking"
    SYNCING = "syncing"
    DOWN = "down"
    BROKEN = "broken"
    CLOSED = "closed"


_NEXT = {
    State.STARTING: {State.SYNCING},
    State.AWAKE: {State.CLOSING_GATE, State.DOWN},
    State.CLOSING_GATE: {State.ASLEEP, State.SYNCING, State.AWAKE, State.DOWN},
    State.ASLEEP: {State.WAKING},
    State.WAKING: {State.SYNCING, State.DOWN},
    State.SYNCING: {State.AWAKE, State.ASLEEP, State.DOWN},
    State.DOWN: {State.WAKING, State.ASLEEP},
    State.BROKEN: set(),
    State.CLOSED: set(),
}


class StateBox:
    """Owns the state. Read from any thread; moved by one transition at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = State.STARTING
        self._why = ""

    @property
    def state(self) -> State:
        return self._state

    @property
    def why(self) -> str:
        """Why the server is broken; empty otherwise."""
        return self._why

    def move(self, to: State) -> None:
        """Go to `to`, or raise `StateError` where the table has no such step."""
        with self._lock:
            if to not in _NEXT[self._state]:
                raise StateError(f"a server that is {self._state} can't become {to}")
            self._state = to

    def break_(self, why: str) -> None:
        """Mark as broken, for good; the first reason given is the one kept."""
        with self._lock:
            if self._state not in (State.BROKEN, State.CLOSED):
                self._state, self._why = State.BROKEN, why

    def close(self) -> bool:
        """Mark as closed. True for the first caller, who does the closing."""
        with self._lock:
            first, self._state = self._state is not State.CLOSED, State.CLOSED
            return first

    def require_open(self) -> None:
        """Raise `StateError` if the server is closed or broken."""
        if self._state is State.CLOSED:
            raise StateError("the server is closed; attach() again for a new one")
        if self._state is State.BROKEN:
            raise StateError(f"the server is broken ({self._why}); close() it and attach() again")

    @contextlib.contextmanager
    def open_throughout(self) -> Iterator[None]:
        """`StateError` if the server is closed or broken, or is closed meanwhile."""
        self.require_open()
        try:
            yield
        except RolloutServerError as error:
            if self._state is State.CLOSED:
                raise StateError("the server was closed meanwhile") from error
            raise
