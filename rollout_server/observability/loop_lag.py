"""How late the event loop is, and whose code held it: what holds the loop holds every stream.

A thread asks the loop for a sign of life ten times a second. Where that takes longer than `HELD`,
it looks at what the loop's thread is at: the innermost function of vLLM or of this package tells
whose work it is. Where there is neither, another thread has Python's lock, the trainer's for one.
C code that keeps the lock is still on the stack when the watching thread gets its turn.
"""

import asyncio
import sys
import threading
import time
from types import FrameType

from rollout_server.observability.metrics import Metrics

HELD = 0.02  # seconds, from which the loop counts as held
_EVERY = 0.1  # seconds
_LOOK = 1.0  # seconds between two looks at a loop that is held
_OURS, _VLLM, _OTHERS = "rollout_server", "vllm", "others"


class LoopWatch:
    """Watches the loop that it is made on, until `stop`."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="rollout-lag", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY):
            sign, asked, by = threading.Event(), time.perf_counter(), _OTHERS
            try:
                self._loop.call_soon_threadsafe(sign.set)
            except RuntimeError:  # the loop has ended
                return
            if not sign.wait(HELD):
                by = holder(sys._current_frames().get(self._thread))
                while not sign.wait(_LOOK):
                    if self._stopped.is_set():
                        return
            late = time.perf_counter() - asked
            self._metrics.observe("loop_lag_seconds", late)
            if late > HELD:
                self._metrics.count("loop_held_seconds", late, by=by)


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
