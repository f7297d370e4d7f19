"""Syncs that come to the engine core by a pipe of the trainer's, not by vLLM's sockets. Runs in the
engine's process.

Between two processes on one machine vLLM's way takes a millisecond each time: an event loop, a
socket, a thread and a queue on either side. Here a thread waits at a pipe and puts the call into
the queue that the core reads between two steps; the answer goes into another pipe from there.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.weights.wire import LENGTH_BYTES, LINE_BYTES, LineAnswer, LineCall, pack, unpack

Refit = Callable[[Any, Any, str], Any]


def install(kind: Any, refit: Refit) -> None:
    """Have a class of engine cores listen where it is told to; refit: what it does with a call."""
    compat.take_calls()

    def listen(core: Any, pid: int, calls: int, answers: int) -> None:
        """calls, answers: descriptors of process `pid`, which are pipes."""
        ends = _open(pid, calls, os.O_RDONLY), _open(pid, answers, os.O_WRONLY)
        threading.Thread(target=_listen, args=(refit, core, *ends), daemon=True).start()

    setattr(kind, compat.LISTEN, listen)


def _open(pid: int, fd: int, how: int) -> int:
    return os.open(f"/proc/{pid}/fd/{fd}", how | os.O_CLOEXEC)


def _listen(refit: Refit, core: Any, calls: int, answers: int) -> None:
    """Until the trainer closes its end. One call at a time, each of which is one write."""
    while said := os.read(calls, LINE_BYTES):
        call = unpack(said, LineCall)
        compat.put_call(core, partial(_answer, refit, core, call, answers))
    os.close(calls)


def _answer(refit: Refit, core: Any, call: LineCall, answers: int) -> None:
    try:
        result = refit(core, call.message, call.version)
    except Exception as error:
        _say(answers, LineAnswer(call.number, error=f"{type(error).__name__}: {error}"))
        return
    if isinstance(result, list):
        _say(answers, LineAnswer(call.number, result))
        return

    def later(done: Any) -> None:
        _answer(lambda *_: done.result(), core, call, answers)

    result.add_done_callback(later)


def _say(answers: int, answer: LineAnswer) -> None:
    packed = pack(answer)
    left = memoryview(len(packed).to_bytes(LENGTH_BYTES, "little") + packed)
    with contextlib.suppress(BrokenPipeError):  # the trainer has gone
        while left:
            left = left[os.write(answers, left) :]
