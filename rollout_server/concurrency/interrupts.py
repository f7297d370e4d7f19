"""Signals whose handlers raise, Ctrl-C's for one, are told between the steps of a transition.

Python runs a signal's handler in the main thread, between any two of its bytecodes. A
KeyboardInterrupt there could lose what a transition has done and not yet written down. While
`held` is active the handlers of `_SIGNALS` wait: until the block comes to its end, or, once the
block's grace is over or the signal came a second time, to the next place where it only waits
(`waiting`). What they raise comes out there, and the block ends in order.

Signals without a handler in Python end the process as they always do.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rollout_server.concurrency.patience import Patience

GRACE = 1.0  # seconds, for what mostly takes less
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_SLICE = 0.1  # seconds

# Of the main thread, which alone runs handlers, and of the outermost block.
_handlers: dict[int, Callable[[int, Any], Any]] = {}
_noted: list[tuple[int, float]] = []
_grace = 0.0


@contextlib.contextmanager
def held(grace: float = 0.0) -> Iterator[None]:
    """Signals wait for the end of the block, or past `grace` seconds for a wait in it.

    In other threads than the main one, and inside of another such block, nothing changes.
    """
    global _grace
    if threading.current_thread() is not threading.main_thread() or _handlers:
        yield
        return
    _grace = grace
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                _handlers[number] = handler
                signal.signal(number, _note)
        yield
    finally:
        while _handlers:  # SIGINT's last: from then on it raises here again
            signal.signal(*_handlers.popitem())
        while _noted:
            signal.raise_signal(_noted.pop(0)[0])


def waiting(ready: Callable[[float], bool], seconds: float) -> bool:
    """Whether `ready` came true within `seconds`; a place where a signal that is held may raise.

    ready: waits for the seconds that it is given at most, and tells whether what it waits for is
    there.
    """
    patience = Patience(seconds)
    while not ready(min(patience.left, _SLICE)):
        deliver()
        if patience.spend() <= 0:
            return ready(0)
    return True


def deliver() -> None:
    """Run the handlers of signals that are held, if they have waited for long enough."""
    if not _noted or threading.current_thread() is not threading.main_thread():
        return
    if len(_noted) > 1 or time.monotonic() - _noted[0][1] >= _grace:
        while _noted:
            number = _noted.pop(0)[0]
            _handlers[number](number, sys._getframe())


def interrupts(error: BaseException) -> bool:
    """Whether `error` is a signal's or the interpreter's way to end what runs, here or on another
    rank, and not a failure."""
    kinds = (KeyboardInterrupt.__name__, SystemExit.__name__)
    return not isinstance(error, Exception) or getattr(error, "kind", "") in kinds


def _note(number: int, frame: Any) -> None:
    _noted.append((number, time.monotonic()))
