"""Processes of the benchmark: they end with who started them, and a companion answers it."""

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any

from rollout_server.engine.processes import kill_trees

_PR_SET_PDEATHSIG = 1
_LAST = 5.0  # seconds for one whose connection is gone to end
_FAREWELL = 60.0  # seconds for a companion that isn't needed any more to end by itself


def end_with(parent: int) -> None:
    """Have this process killed when the thread of `parent` that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def resolve(target: str) -> Callable[..., Any]:
    """The function that "module:name" names."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


class CompanionError(RuntimeError):
    """A companion failed, ended or was too slow."""


class Companion:
    """A process that is asked for things. It makes what answers by calling `target`, a
    "module:name", with `options`; each question goes to what that returned, as its argument."""

    def __init__(self, target: str, options: Mapping[str, Any]):
        self._target = target
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "rollout_server.bench.gpu.companion"]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(os.getpid()), target],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection.send(dict(options))

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def ready(self, seconds: float) -> None:
        """Wait until it can be asked."""
        self._answer(seconds)

    def ask(self, question: Any, seconds: float) -> Any:
        """Its answer; `CompanionError` if there is none within `seconds`."""
        with self._ending():
            self._connection.send(question)
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        with self._ending():
            if not self._connection.poll(seconds):
                raise CompanionError(f"{self._target}: no answer within {seconds:g} s")
            error, answer = self._connection.recv()
        if error:
            raise CompanionError(f"{self._target}:\n{error}")
        return answer

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Where it may turn out that it has ended."""
        try:
            yield
        except (EOFError, OSError) as gone:
            self._end(_LAST)
            status = self._process.returncode
            raise CompanionError(f"{self._target} ended with status {status}") from gone

    def _end(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_trees([self._process.pid])
            self._process.wait()

    def __enter__(self) -> "Companion":
        return self

    def __exit__(self, *_: Any) -> None:
        self._connection.close()
        self._end(_FAREWELL)


def main() -> None:
    """A companion's process."""
    number, parent, target = sys.argv[1:]
    end_with(int(parent))
    connection = Connection(int(number))
    try:
        work = resolve(target)(**connection.recv())
        connection.send(("", None))
        while True:
            connection.send(("", work(connection.recv())))
    except EOFError:
        pass  # it isn't needed any more
    except Exception:
        with contextlib.suppress(OSError):
            connection.send((traceback.format_exc(), None))


if __name__ == "__main__":
    main()
