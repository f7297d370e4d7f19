"""The engine's processes, as the operating system sees them."""

import contextlib
import os
import select
import time
import weakref
from collections.abc import Iterable
from typing import Any

import psutil

_PATIENCE = 5.0  # seconds for processes that were sent SIGKILL to be gone


class EngineProcesses:
    """Those that vLLM's client has started, the engine core first, and what these have started."""

    def __init__(self, client: Any):
        """client: vLLM's `AsyncLLM`."""
        manager = client.engine_core.resources.engine_manager
        self._started = [psutil.Process(p.pid) for p in manager.processes]
        self._ends = [_End(process) for process in self._started]

    @property
    def pid(self) -> int:
        """Of the engine core."""
        number: int = self._started[0].pid
        return number

    @property
    def all_run(self) -> bool:
        return not any(end.has_come for end in self._ends)

    @property
    def condition(self) -> str:
        """What the engine core does, for errors."""
        try:
            return f"process {self.pid} is {self._started[0].status()}"
        except psutil.Error:
            return f"process {self.pid} has ended"

    @property
    def resident_bytes(self) -> int:
        """Host memory of all of them."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def tree(self) -> list[psutil.Process]:
        """All that are there now."""
        return _with_children(self._started)


class _End:
    """Whether a child process has ended, as a zombie too; in a hundredth of the time that reading
    /proc takes, where the system has pidfds (Linux 5.3)."""

    def __init__(self, process: psutil.Process):
        self._process = process
        self._poll: select.poll | None = None
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(process.pid)
            weakref.finalize(self, os.close, fd)
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)

    @property
    def has_come(self) -> bool:
        if self._poll is None:
            return not _runs(self._process)
        return bool(self._poll.poll(0))


def kill(processes: Iterable[psutil.Process]) -> None:
    """End processes at once, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.wait(max(0.0, deadline - time.monotonic()))


def kill_trees(pids: Iterable[int]) -> None:
    """End processes and all that they started, at once."""
    roots = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            roots.append(psutil.Process(pid))
    kill(_with_children(roots))


def _with_children(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    tree: list[psutil.Process] = []
    for process in roots:
        with contextlib.suppress(psutil.Error):
            tree += [process, *process.children(recursive=True)]
    return tree


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
