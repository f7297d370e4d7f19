"""What of the trainer's memory an engine has been given, until it has let go of it.

torch counts the processes that it has given a GPU's memory to, in a file in shared memory: what is
freed while the count isn't 0 waits, and is given back to nobody. The count falls where the other
process lets go; in one that was killed nothing does, so it is lowered here.
"""

import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

import torch

from rollout_server.weights.wire import COUNTERS


class Handle(Protocol):
    """What another process opens memory with."""

    @property
    def counter_file(self) -> str | None:
        """Name of torch's file with the count of who has it open; None: nobody counts."""

    def release(self) -> None:
        """In the place of a process that had opened it, and has ended."""


class Exports:
    """Handles that the engine of one server has been given. Of any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: dict[Hashable, tuple[list[Handle], list[Handle]]] = {}
        self._held: dict[Hashable, list[torch.UntypedStorage]] = {}
        self._folder: str | None = None
        self._noted: set[str] = set()

    def note_in(self, folder: str) -> None:
        """Write names of torch's files with counts into a file of the server's folder, for who
        looks after what this process leaves behind."""
        self._folder = folder

    def give(
        self,
        key: Hashable,
        handles: Iterable[Handle],
        memory: Iterable[torch.UntypedStorage] = (),
    ) -> None:
        """The engine is told `handles`, in the place of those that it was told by the same key
        before: it lets go of these when it has the new ones, which is so at the next call.

        memory: what they are of. On a CPU it is kept meanwhile, so that no other has its addresses,
        by which it is known; on a GPU torch sees to that.
        """
        with self._lock:
            self._held[key] = [storage for storage in memory if storage.device.type == "cpu"]
            now = list(handles)
            self._given[key] = now, self._given.get(key, ([], []))[0]
            self._note({handle.counter_file for handle in now} - {None} - self._noted)

    def let_go(self, of: Callable[[Hashable], bool]) -> None:
        """The engine has let go of what it was given by keys `of` which that is true."""
        with self._lock:
            self._given = {key: given for key, given in self._given.items() if not of(key)}
            self._held = {key: memory for key, memory in self._held.items() if not of(key)}

    def engine_ended(self) -> None:
        """No process of the engine is there any more: what it had open is the trainer's alone."""
        with self._lock:
            given, self._given = self._given, {}
            self._held.clear()
        for now, before in given.values():
            for handle in [*now, *before]:
                handle.release()
        if given:
            collect()

    def _note(self, names: set[str | None]) -> None:
        if self._folder is None or not names:
            return
        with open(os.path.join(self._folder, COUNTERS), "a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in names)
        self._noted |= {name for name in names if name is not None}


def collect() -> None:
    """Free the GPU memory that was freed here while another process still had it open."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()


def give_back() -> None:
    """Have torch give the GPU memory that it holds for this process's next tensors back to the GPU,
    what the engine has let go of included."""
    collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
