"""The processes that train together, where there are several: `torch.distributed`'s ranks.

Each has an engine of its own, or each group of neighbours has one (see engine/group.py). A step of
all of them counts when all have done it. They tell each other through the process group's key-value
store, which has a deadline for each wait and can say who is missing; no collective is called, so
none of the trainer's can be disturbed.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from rollout_server.concurrency.interrupts import waiting
from rollout_server.errors import ConfigError, DeadlineError, RankError

_joined = itertools.count()
_BUSY = "busy/{}"
_SHORTEST, _LONGEST = 0.0002, 0.01  # seconds between two looks into the store


class Ranks:
    """This process, number `rank` of `size`."""

    def __init__(self, rank: int, size: int, store: Any, name: str = "", first: int = 0):
        """first: number of the first of these ranks, by which they are called in errors."""
        self.rank = rank
        self.size = size
        self._store = store
        self._name = name
        self._first = first
        self._rounds = itertools.count()

    @classmethod
    def join(cls) -> "Ranks":
        """All ranks must call this equally often; a process without a group is alone."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(0, 1, None)
        # A connection of its own: waits block it.
        store = dist.distributed_c10d._get_default_store().clone()
        prefix = f"rollout_server/{next(_joined)}"
        return cls(dist.get_rank(), dist.get_world_size(), dist.PrefixStore(prefix, store), prefix)

    @property
    def local_rank(self) -> int:
        """This process's number among those of its machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else 0

    @property
    def several_machines(self) -> bool:
        return self.size > int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def group(self, size: int) -> "Ranks":
        """This rank and its neighbours, `size` in all and on one machine: ranks by themselves."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1
        if here % size:
            raise ConfigError(
                f"engine_args['tensor_parallel_size']={size}: this machine has {here} rank"
                f"{'s' if here > 1 else ''} of the training run, which can't be put into groups of "
                f"{size}; launch a multiple of {size} on each (accelerate launch --num_processes)"
            )
        if size == 1:
            return Ranks(0, 1, None)
        store = self._store.underlying_store.clone()
        first = self.rank // size * size
        name = f"{self._name}/{first}"
        return Ranks(self.rank - first, size, dist.PrefixStore(name, store), name, first)

    def gather(self, what: str, value: Any, timeout: float) -> list[Any]:
        """The `value` of every rank, in their order; JSON carries it.

        what: the call that all ranks make now. Raises `DeadlineError` naming the ranks that haven't
        come within `timeout` seconds, `RankError` if one has failed or calls something else.
        """
        if self.size == 1:
            return [value]
        number = self._say(what, value)
        keys = [f"{number}/{rank}" for rank in range(self.size)]
        try:
            while not waiting(lambda seconds: self._there(keys, seconds), timeout):
                if not any(self._store.check([_BUSY.format(rank)]) for rank in self._late(keys)):
                    raise RuntimeError("the wait has ended")
            told = [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:  # of the store too, where rank 0 is gone
            raise DeadlineError(
                f"{what}: {self._missing(keys)} within {timeout:g} s; every rank must call it, and "
                "none may have ended"
            ) from error
        if number > 1:  # all have read what was told two rounds ago
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"{number - 2}/{self.rank}")
        for rank, (other, _, failure) in enumerate(told, self._first):
            if failure is not None:
                error = RankError(f"{what}: rank {rank} failed: {failure}")
                error.kind = failure.partition(":")[0]
                raise self._known(error)
            if other != what:
                raise self._known(
                    RankError(
                        f"{what}: rank {rank} called {other} meanwhile; ranks must make the same "
                        "calls in the same order"
                    )
                )
        return [value for _, value, _ in told]

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """The others wait for this rank as long as the block takes, past their deadlines. What it
        does must have one of its own."""
        if self.size == 1:
            yield
            return
        key = _BUSY.format(self.rank)
        self._store.set(key, "")
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(key)

    @contextlib.contextmanager
    def together(self, what: str, timeout: float) -> Iterator[None]:
        """The block succeeds on all ranks, or raises on all: `RankError` with the reason of
        another rank where this one's went well."""
        try:
            yield
        except BaseException as error:
            self.fail(what, error)
            raise
        self.gather(what, None, timeout)

    def fail(self, what: str, error: BaseException) -> None:
        """Tell the others why this rank doesn't do what all do now, unless they know."""
        if self.size > 1 and getattr(error, "known_to", None) != self._name:
            self._known(error)
            with contextlib.suppress(RuntimeError):
                self._say(what, failure=f"{type(error).__name__}: {error}")

    def _known(self, error: BaseException) -> BaseException:
        error.known_to = self._name
        return error

    def _say(self, what: str, value: Any = None, failure: str | None = None) -> int:
        """Tell the others, without waiting for them; the number of this round."""
        number = next(self._rounds)
        self._store.set(f"{number}/{self.rank}", json.dumps([what, value, failure]))
        return number

    def _there(self, keys: list[str], seconds: float) -> bool:
        """Whether all have told by then."""
        until, pause = time.monotonic() + seconds, _SHORTEST
        while not self._store.check(keys):  # a wait of the store's own prints when it ends
            if time.monotonic() >= until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        return True

    def _late(self, keys: list[str]) -> list[int]:
        """Numbers, among these, of the ranks that haven't told."""
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def _missing(self, keys: list[str]) -> str:
        try:
            missing = [str(self._first + rank) for rank in self._late(keys)]
        except RuntimeError:
            return "rank 0, which keeps the store, can't be reached"
        return f"rank {', '.join(missing)} didn't come"
