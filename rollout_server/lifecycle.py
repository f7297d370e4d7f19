"""The server's transitions: who may run when, and in which order things happen.

Order of a step, each line the cure of a known failure:

1. close the gate: new requests are held;
2. bring running requests to rest (vLLM freezes or finishes them) and forget all caches;
3. sleep;
4. (the trainer trains)
5. wake the weights, write the trainer's, compare; only then the KV cache: an engine that is
   half awake must not run a forward pass;
6. raise the policy version, open the gate.

One transition at a time. A step isn't cancelled by its caller going away; what fails after the gate
was closed and can't be undone marks the server broken and tells every held request.
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
    RankError,
    RolloutServerError,
    StateError,
    first_line,
)
from rollout_server.http.gate import Gate
from rollout_server.journal import Journal
from rollout_server.state import State, StateBox


class Lifecycle:
    """Runs on the server's loop. Owns the transitions and the policy version."""

    def __init__(
        self, config: RolloutConfig, engine: Engine, box: StateBox, gate: Gate, journal: Journal
    ):
        self._config = config
        self._engine = engine
        self._box = box
        self._gate = gate
        self._journal = journal
        self._turn = asyncio.Lock()
        self._left: asyncio.Future | None = None
        self.version = -1  # the first sync, at attach, makes it 0

    async def sleep(self) -> None:
        """awake -> asleep; nothing to do if asleep already."""
        await _to_its_end(self._sleep)

    async def begin_sync(self) -> "SyncTransition":
        """Bring the engine to where its weights can be written. The transition must be ended."""
        sync = SyncTransition(self)
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
            async with _deadline(self._config.sync_timeout, "comparing weights"):
                yield self._engine

    async def _sleep(self) -> None:
        async with self._turn:
            self._box.require_open()
            if self._box.state is State.ASLEEP:
                return
            with self._journal.sleeping():
                await self._rest()
                await self._fall_asleep()

    async def _fall_asleep(self) -> None:
        with self._breaking("falling asleep"):
            async with _deadline(self._config.sleep_timeout, "falling asleep"):
                await self._engine.sleep()
            self._box.move(State.ASLEEP)

    async def _rest(self) -> None:
        """Close the gate and bring the engine to rest. A drain that takes too long is undone."""
        self._box.move(State.CLOSING_GATE)
        self._gate.close()
        if self._config.in_flight == "drain":
            try:
                async with _deadline(self._config.drain_timeout, "letting running requests finish"):
                    await self._engine.drain()
            except (DeadlineError, RankError):
                self._box.move(State.AWAKE)
                self._gate.open()
                raise
        with self._breaking("bringing running requests to rest"):
            async with _deadline(self._config.sleep_timeout, "bringing running requests to rest"):
                await self._engine.pause()

    @contextlib.contextmanager
    def _breaking(self, doing: str) -> Iterator[None]:
        """Marks the server broken if the block raises: its engine is in an unknown condition."""
        try:
            yield
        except BaseException as error:
            self._break(f"{doing}: {first_line(error)}")
            raise

    def _break(self, why: str) -> None:
        self._box.break_(why)
        self._journal.broke(why)
        self._gate.shut(f"the engine is broken: {why}")


class SyncTransition:
    """One sync, step by step: `begin`, then `write` for each part, then `commit` or `abort`.

    Made by `Lifecycle.begin_sync`; holds the turn until it is ended.
    """

    def __init__(self, lifecycle: Lifecycle):
        self._life = lifecycle
        self._config = lifecycle._config
        self._engine = lifecycle._engine
        self.was_asleep = False
        self._written = False
        self._running = asyncio.Lock()
        self.seconds_awaking = 0.0

    async def begin(self) -> None:
        life = self._life
        await life._turn.acquire()
        try:
            life._box.require_open()
            self.was_asleep = life._box.state is State.ASLEEP
            if self.was_asleep:
                life._box.move(State.WAKING)
            elif life._box.state is State.AWAKE:
                await life._rest()
            with life._breaking("waking the weights"):
                if self.was_asleep:
                    await self._wake(self._engine.wake_weights, "waking the weights")
                life._box.move(State.SYNCING)
        except BaseException:
            life._turn.release()
            raise

    async def write(self, work: Callable[[Engine], Coroutine]) -> Any:
        """Write a part of the weights with `work`, given the engine."""
        return await _to_its_end(self._write, work)

    async def _write(self, work: Callable[[Engine], Coroutine]) -> Any:
        async with self._running:
            self._written = True
            async with _deadline(self._config.sync_timeout, "writing weights"):
                return await work(self._engine)

    async def read(self, work: Callable[[Engine], Coroutine]) -> Any:
        """Compare a part of the weights with `work`, given the engine."""
        async with self._running, _deadline(self._config.sync_timeout, "comparing weights"):
            return await work(self._engine)

    async def commit(self) -> int:
        """All is written: raise the version, let requests flow. The new version."""
        return await _to_its_end(self._commit)

    async def _commit(self) -> int:
        life = self._life
        try:
            with life._breaking("resuming with new weights"):
                async with _deadline(self._config.wake_timeout, "telling the engine its version"):
                    # Before scheduling resumes, so that each token is counted to its version.
                    await self._engine.set_weight_version(life.version + 1)
                await self._resume()
                life.version += 1
                life._box.move(State.AWAKE)
            life._gate.open()
            return life.version
        finally:
            life._turn.release()

    async def abort(self, why: str) -> None:
        """Go back to where the engine was, or mark it broken if weights have been written."""
        await _to_its_end(self._abort, why)

    async def _abort(self, why: str) -> None:
        life = self._life
        try:
            async with self._running:  # a step that its caller has left
                pass
            syncing = life._box.state is State.SYNCING
            if await self._anything_written() or life.version < 0 or not syncing:
                life._break(f"syncing weights: {why}")
            elif self.was_asleep:
                await life._fall_asleep()
            else:
                with life._breaking("resuming"):
                    await self._resume()
                    life._box.move(State.AWAKE)
                life._gate.open()
        finally:
            life._turn.release()

    async def _anything_written(self) -> bool:
        """By any rank of this engine; so it is taken to be where one doesn't say."""
        try:
            async with _deadline(self._config.sleep_timeout, "whether anything was written"):
                return await self._engine.anywhere(self._written)
        except RolloutServerError:
            return True

    async def abandon(self, beginning: asyncio.Future) -> None:
        """End a transition whose caller went away while it began."""
        await asyncio.wait({beginning})
        if beginning.exception() is None:
            await self.abort("its caller went away")

    async def _resume(self) -> None:
        by = "sleep" if self.was_asleep else "sync"
        self._life._journal.interrupted(self._engine.running, by)
        if self.was_asleep:
            await self._wake(self._engine.wake_kv_cache, "waking the KV cache")
        else:
            async with _deadline(self._config.wake_timeout, "resuming"):
                await self._engine.resume()

    async def _wake(self, work: Callable[[], Coroutine], what: str) -> None:
        started = time.perf_counter()
        async with _deadline(self._config.wake_timeout, what):
            await work()
        self.seconds_awaking += time.perf_counter() - started


async def _to_its_end(work: Callable[..., Coroutine], *args: Any) -> Any:
    """The caller's cancellation (its deadline, Ctrl-C) doesn't stop `work` half-way."""
    return await asyncio.shield(asyncio.ensure_future(work(*args)))


@contextlib.asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineError(f"{what}: not done after {seconds:g} s") from None
