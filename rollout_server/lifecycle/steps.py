"""What transitions are made of: steps of the engine, and what becomes of the server if one fails.

An engine that dies, or that doesn't do what it is asked in time and is ended for it, leaves the
server down, and is started anew on the way to "awake". What else fails after the gate was closed
and can't be undone marks the server broken and tells every held request.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

from rollout_server.concurrency.patience import patient
from rollout_server.config import RolloutConfig
from rollout_server.engine.protocol import EngineProtocol
from rollout_server.errors import (
    DeadlineError,
    EngineDeadError,
    EngineStartError,
    EngineTimeoutError,
    OutOfMemoryError,
    RankError,
    first_line,
)
from rollout_server.lifecycle.gate import Gate
from rollout_server.lifecycle.restarts import Restarts
from rollout_server.lifecycle.state import State, StateBox
from rollout_server.observability.events import Journal

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class Unfinished:
    """What a sync that was interrupted leaves to the next one: an engine at rest, `asleep` but for
    its weights' memory or a `fresh` one, whose weights are written in part."""

    asleep: bool
    fresh: bool


class Steps:
    """Runs on the server's loop, in transitions, which hold `transition_lock` meanwhile.

    Attributes:
        transition_lock: one transition at a time.
        restarts: how many are left.
    """

    def __init__(
        self,
        config: RolloutConfig,
        engine: EngineProtocol,
        box: StateBox,
        gate: Gate,
        journal: Journal,
        beside_start: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        """beside_start: what the trainer's side does while an engine starts anew."""
        self.config = config
        self.engine = engine
        self.box = box
        self.gate = gate
        self.journal = journal
        self._beside_start = beside_start
        self.transition_lock = asyncio.Lock()
        self.restarts = Restarts(config.restarts)
        self._version = -1  # the first sync, at attach, makes it 0
        self._unfinished: Unfinished | None = None

    @property
    def down(self) -> bool:
        """Whether the engine has died and the next transition to "awake" starts another."""
        return self.box.state is State.DOWN

    @property
    def version(self) -> int:
        """The policy's; -1 until the first sync is done."""
        return self._version

    def set_version(self, version: int) -> None:
        """Tokens are sampled with this version from now on."""
        self._version = version

    @property
    def unfinished(self) -> bool:
        """Whether a sync was interrupted, in the state "syncing", and none is at it again."""
        return self._unfinished is not None

    def leave_unfinished(self, left: Unfinished) -> None:
        """A sync was interrupted: another one goes on, or the engine falls asleep."""
        self._unfinished = left

    def take_unfinished(self) -> Unfinished | None:
        """What an interrupted sync has left, for who goes on with it."""
        left, self._unfinished = self._unfinished, None
        return left

    async def quiesce(self, pause: bool = True) -> None:
        """Close the gate and bring the engine to rest. A drain that takes too long is undone.

        pause: else what needn't finish runs on, until the engine is told otherwise.
        """
        self.box.move(State.CLOSING_GATE)
        self.gate.close()
        what = "bringing running requests to rest"
        with self.breaking(what):
            await self._let_finish()
            if pause:
                async with self.deadline(self.config.sleep_timeout, what):
                    await self.engine.pause()

    async def fall_asleep(self) -> None:
        """From rest."""
        with self.breaking("falling asleep"):
            async with self.deadline(self.config.sleep_timeout, "falling asleep"):
                await self.engine.sleep()
            self.box.move(State.ASLEEP)

    async def leave(self, left: Unfinished) -> None:
        """Fall asleep from a sync that was interrupted."""
        if not left.fresh:
            await self.fall_asleep()
            return
        self.engine.kill()  # it has no requests yet, and can't be given them asleep
        self.box.move(State.ASLEEP)

    async def revive(self) -> None:
        """Start engines until one runs; `EngineDeadError` when the restarts are used up."""
        while True:
            await asyncio.sleep(self.restarts.delay())
            started = time.perf_counter()
            try:
                with self._beside_start():
                    async with patient(self.config.start_timeout):
                        await self.engine.restart()
                self.restarts.succeeded()
                self.journal.restarted(time.perf_counter() - started)
                return
            except (EngineStartError, EngineDeadError, OutOfMemoryError, TimeoutError) as error:
                self.engine.kill()
                self.restarts.failed()
                self.journal.not_restarted(first_line(error))

    async def _let_finish(self) -> None:
        """Return when no request runs that is to finish first; awake again if it takes too long."""
        limit, doing = self.config.drain_timeout, "letting running requests finish"
        try:
            async with patient(limit):
                if self.config.in_flight == "drain":
                    await self.engine.drain()
                else:
                    await self.engine.run_on_leader(doing, self._finish)
        except (TimeoutError, RankError) as error:
            self.box.move(State.AWAKE)
            self.gate.open()
            if isinstance(error, RankError):
                raise
            raise DeadlineError(
                f"{doing}: not done after drain_timeout={limit:g} s; the server is awake as before"
            ) from None

    async def _finish(self) -> None:
        """Of those that asked for it."""
        while self.gate.to_finish:
            self.engine.require_alive()
            await asyncio.sleep(0.01)

    @contextlib.contextmanager
    def unless_down(self) -> Iterator[None]:
        """Leaves the block where the engine has ended in it and another may be started."""
        try:
            yield
        except (EngineDeadError, EngineTimeoutError):
            if not self.down:
                raise

    @contextlib.contextmanager
    def breaking(self, doing: str) -> Iterator[None]:
        """If the block raises in a transition, its engine is in an unknown condition: the server is
        down, or broken where that can't be mended."""
        try:
            yield
        except BaseException as error:
            if self.box.state is not State.AWAKE:
                self.lose_or_break(doing, error)
            raise

    def lose_or_break(self, doing: str, error: BaseException) -> None:
        """After `error`: down if it is the engine's end and another may be started, else broken."""
        if self.box.state is State.CLOSED:
            return
        why = f"{doing}: {first_line(error)}"
        lost = isinstance(error, (EngineDeadError, EngineTimeoutError)) or self.engine.dead
        if not (lost and self.restarts.left and self.version >= 0):
            self.break_(why)
            return
        self.journal.died(why)
        self.gate.close()
        self.engine.kill()
        self.box.move(State.DOWN)

    def break_(self, why: str) -> None:
        """Only `close()` is left; all who wait are told."""
        self.box.break_(why)
        self.journal.broke(why)
        self.gate.shut(f"the engine is broken: {why}")
        self.engine.give_up(why)

    @contextlib.asynccontextmanager
    async def deadline(self, seconds: float, what: str) -> AsyncIterator[None]:
        """For calls into the engine: `EngineTimeoutError` tells the state of both sides."""
        try:
            async with patient(seconds):
                yield
        except TimeoutError:
            raise EngineTimeoutError(
                f"{what}: not done after {seconds:g} s; the server is {self.box.state} at policy "
                f"version {self.version}, the engine's {self.engine.condition}"
            ) from None


async def shielded(work: Callable[[*Ts], Coroutine[Any, Any, T]], *args: *Ts) -> T:
    """The caller's cancellation (its deadline, Ctrl-C) doesn't stop `work` half-way."""
    return await asyncio.shield(asyncio.ensure_future(work(*args)))
