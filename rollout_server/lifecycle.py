"""The server's transitions: who may run when, and in which order things happen.

Order of a step, each line the cure of a known failure:

1. close the gate: new requests are held;
2. bring running requests to rest (vLLM freezes or finishes them) and forget all caches;
3. sleep;
4. (the trainer trains)
5. wake the weights, write the trainer's, compare; only then the KV cache: an engine that is
   half awake must not run a forward pass;
6. raise the policy version, resume, open the gate.

One transition at a time. A step isn't cancelled by its caller going away. An engine that dies, or
that doesn't do what it is asked in time and is ended for it, is started anew on the way to "awake",
and takes the weights and the requests of the one before. What else fails after the gate was closed
and can't be undone marks the server broken and tells every held request.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from rollout_server.config import RolloutConfig
from rollout_server.engine.engine import Engine
from rollout_server.errors import (
    DeadlineError,
    EngineDeadError,
    EngineStartError,
    EngineTimeoutError,
    RankError,
    RolloutServerError,
    StateError,
    first_line,
)
from rollout_server.group import of_first
from rollout_server.http.gate import Gate
from rollout_server.journal import Journal
from rollout_server.restarts import Restarts
from rollout_server.state import State, StateBox


class Lifecycle:
    """Runs on the server's loop. Owns the transitions and the policy version."""

    def __init__(
        self, config: RolloutConfig, engine: Engine, box: StateBox, gate: Gate, journal: Journal,
        beside_start: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):  # fmt: skip
        """beside_start: what the trainer's side does while an engine starts anew."""
        self._config = config
        self._engine = engine
        self._box = box
        self._gate = gate
        self._journal = journal
        self._beside_start = beside_start
        self._turn = asyncio.Lock()
        self._left: asyncio.Future | None = None
        self.restarts = Restarts(config.restarts)
        self.version = -1  # the first sync, at attach, makes it 0

    @property
    def down(self) -> bool:
        """Whether the engine has died and the next transition to "awake" starts another."""
        return self._box.state is State.DOWN

    async def lose(self, why: str, hung: bool = False) -> None:
        """The engine was seen to be dead, or `hung`, while it should be awake."""
        async with self._turn:
            if self._box.state is State.AWAKE and (hung or self._engine.dead):
                error = (EngineTimeoutError if hung else EngineDeadError)(why)
                self._lose_or_break("awake", error)

    async def give_up(self, why: str) -> None:
        """The engine that is down won't be restarted."""
        async with self._turn:
            if self.down:
                self._break(why)

    async def sleep(self) -> None:
        """awake -> asleep; nothing to do if asleep already."""
        await _to_its_end(self._sleep)

    async def begin_sync(self, restoring: bool = False) -> "SyncTransition":
        """Bring the engine to where its weights can be written. The transition must be ended.

        restoring: only if the engine is down; `StateError` otherwise.
        """
        sync = SyncTransition(self, restoring)
        beginning = asyncio.ensure_future(sync.begin())
        try:
            await asyncio.shield(beginning)
        except asyncio.CancelledError:  # nobody is left to end it
            self._left = asyncio.ensure_future(sync.abandon(beginning))
            raise
        return sync

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Engine]:
        """While the engine's weights are read, requests run and no transition does."""
        async with self._turn:
            self._box.require_open()
            if self._box.state is not State.AWAKE:
                raise StateError(
                    f"the server is {self._box.state}, its weights can't be compared; wake() it "
                    "first"
                )
            async with self._deadline(self._config.sync_timeout, "comparing weights"):
                yield self._engine

    async def _sleep(self) -> None:
        async with self._turn:
            self._box.require_open()
            if self._box.state is State.ASLEEP:
                return
            with self._journal.sleeping():
                try:
                    if not self.down:
                        await self._rest()
                        await self._fall_asleep()
                except (EngineDeadError, EngineTimeoutError):
                    if not self.down:
                        raise
                if self.down:  # its memory is free; it is started anew when it is to wake
                    self._box.move(State.ASLEEP)

    async def _fall_asleep(self) -> None:
        with self._breaking("falling asleep"):
            async with self._deadline(self._config.sleep_timeout, "falling asleep"):
                await self._engine.sleep()
            self._box.move(State.ASLEEP)

    async def _revive(self) -> None:
        """Start engines until one runs; `EngineDeadError` when the restarts are used up."""
        while True:
            await asyncio.sleep(self.restarts.delay())
            started = time.perf_counter()
            try:
                with self._beside_start():
                    async with asyncio.timeout(self._config.start_timeout):
                        await self._engine.restart()
                self.restarts.succeeded()
                self._journal.restarted(time.perf_counter() - started)
                return
            except (EngineStartError, EngineDeadError, TimeoutError) as error:
                self._engine.kill()
                self.restarts.failed()
                self._journal.not_restarted(first_line(error))

    async def _rest(self) -> None:
        """Close the gate and bring the engine to rest. A drain that takes too long is undone."""
        self._box.move(State.CLOSING_GATE)
        self._gate.close()
        with self._breaking("bringing running requests to rest"):
            await self._let_finish()
            what = "bringing running requests to rest"
            async with self._deadline(self._config.sleep_timeout, what):
                await self._engine.pause()

    async def _let_finish(self) -> None:
        """Return when no request runs that is to finish first; awake again if it takes too long."""
        limit, doing = self._config.drain_timeout, "letting running requests finish"
        try:
            async with asyncio.timeout(limit):
                if self._config.in_flight == "drain":
                    await self._engine.drain()
                else:
                    await of_first(self._engine, doing, self._finish)
        except (TimeoutError, RankError) as error:
            self._box.move(State.AWAKE)
            self._gate.open()
            if isinstance(error, RankError):
                raise
            raise DeadlineError(
                f"{doing}: not done after drain_timeout={limit:g} s; the server is awake as before"
            ) from None

    async def _finish(self) -> None:
        """Of those that asked for it."""
        while self._gate.to_finish:
            self._engine.require_alive()
            await asyncio.sleep(0.01)

    @contextlib.contextmanager
    def _breaking(self, doing: str) -> Iterator[None]:
        """If the block raises in a transition, its engine is in an unknown condition: the server is
        down, or broken where that can't be mended."""
        try:
            yield
        except BaseException as error:
            if self._box.state is not State.AWAKE:
                self._lose_or_break(doing, error)
            raise

    def _lose_or_break(self, doing: str, error: BaseException) -> None:
        if self._box.state is State.CLOSED:
            return
        why = f"{doing}: {first_line(error)}"
        lost = isinstance(error, (EngineDeadError, EngineTimeoutError)) or self._engine.dead
        if not (lost and self.restarts.left and self.version >= 0):
            self._break(why)
            return
        self._journal.died(why)
        self._gate.close()
        self._engine.kill()
        self._box.move(State.DOWN)

    def _break(self, why: str) -> None:
        self._box.break_(why)
        self._journal.broke(why)
        self._gate.shut(f"the engine is broken: {why}")
        self._engine.give_up(why)

    @contextlib.asynccontextmanager
    async def _deadline(self, seconds: float, what: str) -> AsyncIterator[None]:
        """For calls into the engine; tells the state of both sides."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise EngineTimeoutError(
                f"{what}: not done after {seconds:g} s; the server is {self._box.state} at policy "
                f"version {self.version}, the engine's {self._engine.condition}"
            ) from None


class SyncTransition:
    """One sync, step by step: `begin`, then `write` for each part, then `commit` or `abort`.

    Made by `Lifecycle.begin_sync`; holds the turn until it is ended.

    Attributes:
        was_asleep: the engine's weights and KV cache had been given back.
        fresh: the engine is a new one, in the place of one that died.
        seconds_awaking: for waking, or starting.
    """

    def __init__(self, lifecycle: Lifecycle, restoring: bool):
        self._life = lifecycle
        self._restoring = restoring
        self._config = lifecycle._config
        self._engine = lifecycle._engine
        self._deadline = lifecycle._deadline
        self.was_asleep = False
        self.fresh = False
        self._ended = False
        self._written = False
        self._running = asyncio.Lock()
        self.seconds_awaking = 0.0

    async def begin(self) -> None:
        life = self._life
        await life._turn.acquire()
        try:
            life._box.require_open()
            if self._restoring and not life.down:
                raise StateError("the engine isn't down any more")
            self.was_asleep = life._box.state is State.ASLEEP
            if life._box.state is State.AWAKE:
                await self._rest()
            if self.was_asleep or life.down:
                life._box.move(State.WAKING)
            with life._breaking("waking the weights"):
                await self._wake_weights()
                life._box.move(State.SYNCING)
        except BaseException:
            self._end()
            raise

    async def _rest(self) -> None:
        try:
            await self._life._rest()
        except (EngineDeadError, EngineTimeoutError):
            if not self._life.down:
                raise

    async def _wake_weights(self) -> None:
        life = self._life
        if life._box.state is not State.WAKING:
            return
        if self.was_asleep and not (self._engine.dead and life.restarts.limit):
            try:
                await self._wake(self._engine.wake_weights, "waking the weights")
                return
            except (EngineDeadError, EngineTimeoutError):
                if not life.restarts.left:
                    raise
        self.was_asleep, self.fresh = False, True
        self._engine.kill()
        started = time.perf_counter()
        await life._revive()
        self.seconds_awaking += time.perf_counter() - started

    async def write(self, work: Callable[[Engine], Coroutine]) -> Any:
        """Write a part of the weights with `work`, given the engine."""
        return await _to_its_end(self._write, work)

    async def _write(self, work: Callable[[Engine], Coroutine]) -> Any:
        async with self._running:
            self._written = True
            async with self._deadline(self._config.sync_timeout, "writing weights"):
                return await work(self._engine)

    async def read(self, work: Callable[[Engine], Coroutine]) -> Any:
        """Compare a part of the weights with `work`, given the engine."""
        async with self._running, self._deadline(self._config.sync_timeout, "comparing weights"):
            return await work(self._engine)

    async def commit(self, same: bool = False) -> int:
        """All is written: raise the version, unless the weights are the `same`, and let requests
        flow. The version."""
        return await _to_its_end(self._commit, same)

    async def _commit(self, same: bool) -> int:
        life, before = self._life, self._life.version
        version = before + (not same)
        try:
            with life._breaking("resuming with new weights"):
                wake = self._config.wake_timeout
                async with self._deadline(wake, "telling the engine its version"):
                    # Before scheduling resumes, so that each token is counted to its version.
                    await self._engine.set_weight_version(version)
                life.version = version
                if not same:
                    life._gate.renew()
                await self._resume()
                life._box.move(State.AWAKE)
            life._gate.open()
            return version
        except BaseException:
            life.version = before
            raise
        finally:
            self._end()

    async def abort(self, error: BaseException) -> None:
        """Go back to where the engine was, or leave it down or broken if weights were written."""
        await _to_its_end(self._abort, error)

    async def _abort(self, error: BaseException) -> None:
        life = self._life
        if self._ended:  # by a commit that failed
            return
        try:
            async with self._running:  # a step that its caller has left
                pass
            unknown = await self._anything_written()  # asked by all ranks of a group
            unknown |= self.fresh or self._engine.dead or isinstance(error, EngineTimeoutError)
            syncing = life._box.state is State.SYNCING
            if unknown or life.version < 0 or not syncing:
                if syncing:
                    life._lose_or_break("syncing weights", error)
                elif not life.down:  # then the step that failed has said so
                    life._break(f"syncing weights: {first_line(error)}")
            else:
                with contextlib.suppress(EngineDeadError, EngineTimeoutError):  # the state tells
                    await self._go_back()
        finally:
            self._end()

    async def _go_back(self) -> None:
        life = self._life
        if self.was_asleep:
            await life._fall_asleep()
            return
        with life._breaking("resuming"):
            await self._resume()
            life._box.move(State.AWAKE)
        life._gate.open()

    def _end(self) -> None:
        self._ended = True
        self._life._turn.release()

    async def _anything_written(self) -> bool:
        """By any rank of this engine; so it is taken to be where one doesn't say."""
        try:
            what = "whether anything was written"
            async with self._deadline(self._config.sleep_timeout, what):
                return await self._engine.anywhere(self._written)
        except RolloutServerError:
            return True

    async def abandon(self, beginning: asyncio.Future) -> None:
        """End a transition whose caller went away while it began."""
        await asyncio.wait({beginning})
        if beginning.exception() is None:
            await self.abort(StateError("its caller went away"))

    async def _resume(self) -> None:
        by = "restart" if self.fresh else "sleep" if self.was_asleep else "sync"
        self._life._journal.interrupted(self._engine.running, by)
        if self.was_asleep:
            await self._wake(self._engine.wake_kv_cache, "waking the KV cache")
        else:
            resume = self._engine.readmit if self.fresh else self._engine.resume
            async with self._deadline(self._config.wake_timeout, "resuming"):
                await resume()

    async def _wake(self, work: Callable[[], Coroutine], what: str) -> None:
        started = time.perf_counter()
        async with self._deadline(self._config.wake_timeout, what):
            await work()
        self.seconds_awaking += time.perf_counter() - started


async def _to_its_end(work: Callable[..., Coroutine], *args: Any) -> Any:
    """The caller's cancellation (its deadline, Ctrl-C) doesn't stop `work` half-way."""
    return await asyncio.shield(asyncio.ensure_future(work(*args)))
