"""How late the event loop is, and whose code held it: what holds the loop holds every stream.

The loop gives a sign of life ten times a second, and notes how late it comes. Where one is later
than `HELD`, a thread looks at what the loop's thread is at: the innermost function of vLLM or of
this package tells whose work it is. Where there is neither, another thread has Python's lock, the
trainer's for one. C code that keeps the lock is still on the stack when the watching thread gets
its turn.
"""

import asyncio
import sys
import threading
import time
from types import FrameType

from rollout_server.observability.metrics import Metrics

HELD = 0.02  # seconds, from which the loop counts as held
_EVERY = 0.1  # seconds
_OURS, _VLLM, _OTHERS = "rollout_server", "vllm", "others"


class LoopWatch:
    """Watches the loop that it is made on, until `stop`."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._stopped = False
        self._next()
        self._seen = 0.0, _OTHERS  # when the sign was due that was missed, and who held the loop
        threading.Thread(target=self._watch, name="rollout-lag", daemon=True).start()

    def stop(self) -> None:
        """From any thread; the watching one ends soon."""
        self._stopped = True

    def _next(self) -> None:
        self._due = time.monotonic() + _EVERY
        self._loop.call_later(_EVERY, self._sign)

    def _sign(self) -> None:
        late = max(0.0, time.monotonic() - self._due)
        self._metrics.observe("loop_lag_seconds", late)
        if late > HELD:
            due, by = self._seen
            by = by if due == self._due else _OTHERS
            self._metrics.count("loop_held_seconds", late, by=by)
        if not self._stopped:
            self._next()

    def _watch(self) -> None:
        while not self._stopped and not self._loop.is_closed():
            due = self._due
            time.sleep(max(due + HELD - time.monotonic(), HELD))
            late = self._due == due and time.monotonic() >= due + HELD
            if late and self._seen[0] != due:
                self._seen = due, holder(sys._current_frames().get(self._thread))


def holder(frame: FrameType | None) -> str:
    """Whose code a thread is at, given its innermost frame."""
    while frame is not None:
        module: str = frame.f_globals.get("__name__", "")
        if module == "rollout_server.concurrency.loop":  # below it is nothing but the loop itself
            break
        package = module.partition(".")[0]
        if package in (_OURS, _VLLM):
            return package
        frame = frame.f_back
    return _OTHERS
