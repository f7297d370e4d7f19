"""A weight sync as the engine and the server's state see it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from rollout_server.concurrency.interrupts import interrupts
from rollout_server.errors import (
    EngineDeadError,
    EngineTimeoutError,
    RolloutServerError,
    StateError,
    first_line,
)
from rollout_server.lifecycle.state import State
from rollout_server.lifecycle.steps import Steps, Unfinished, shielded
from rollout_server.weights.wire import Written


class SyncTransition:
    """One sync, step by step: `begin`, then `writing` for each part, then `commit` or `abort`; or
    all at once: `refit`.

    Made by `Lifecycle.sync`, in any thread. From `begin` on it must be ended by `commit` or
    `abort`, whatever comes of `begin` and whether its caller waits for it: it holds the turn.

    Attributes:
        begun: whether `begin` has been called.
        was_asleep: the engine's weights and KV cache had been given back.
        fresh: the engine is a new one, in the place of one that died.
        seconds_awaking: for waking, or starting.
        ended: by `commit` or `abort`.
    """

    def __init__(self, steps: Steps, restoring: bool):
        self._steps = steps
        self._restoring = restoring
        self._config = steps.config
        self._engine = steps.engine
        self.was_asleep = False
        self.fresh = False
        self.begun = False
        self.ended = False
        self._beginning: asyncio.Future[None] | None = None
        self._runs_on = False  # the engine, though it is to be written to
        self._written = False
        self._running = asyncio.Lock()
        self.seconds_awaking = 0.0

    async def begin(self) -> None:
        """Bring the engine to where its weights can be written."""
        await self._started(pause=True)

    async def refit(self, message: bytes | None) -> tuple[int, Written] | None:
        """`begin`, the writing of the only part, and `commit`: (version, what was copied).

        None where the engine wasn't awake: it has begun then, and goes on step by step. message:
        None if there is nothing to write.
        """
        await self._started(pause=False)
        return await shielded(self._refit, message) if self._runs_on else None

    async def _started(self, pause: bool) -> None:
        self.begun = True
        self._beginning = asyncio.ensure_future(self._begin(pause))
        await asyncio.shield(self._beginning)

    async def _refit(self, message: bytes | None) -> tuple[int, Written]:
        steps = self._steps
        async with self.writing():
            steps.journal.interrupted(self._engine.running, "sync")
            version = steps.version + 1
            written = await self._engine.refit(message, version)
        try:
            steps.set_version(version)
            steps.gate.renew()
            steps.box.move(State.AWAKE)
            steps.gate.open()
        finally:
            self._end()
        return version, written

    async def _begin(self, pause: bool) -> None:
        steps = self._steps
        await steps.transition_lock.acquire()
        try:
            steps.box.require_open()
            if self._restoring and not (steps.down or steps.unfinished):
                raise StateError("the engine has its weights already")
            if (left := steps.take_unfinished()) is not None:
                self.was_asleep, self.fresh, self._written = left.asleep, left.fresh, True
                return
            self.was_asleep = steps.box.state is State.ASLEEP
            if steps.box.state is State.AWAKE:
                with steps.unless_down():
                    await steps.quiesce(pause)
                    self._runs_on = not pause
            if self.was_asleep or steps.down:
                steps.box.move(State.WAKING)
            with steps.breaking("waking the weights"):
                await self._wake_weights()
                steps.box.move(State.SYNCING)
        except BaseException:
            self._end()
            raise

    async def _wake_weights(self) -> None:
        steps = self._steps
        if steps.box.state is not State.WAKING:
            return
        if self.was_asleep and not (self._engine.dead and steps.restarts.limit):
            try:
                await self._wake(self._engine.wake_weights, "waking the weights")
                return
            except (EngineDeadError, EngineTimeoutError):
                if not steps.restarts.left:
                    raise
        self.was_asleep, self.fresh = False, True
        self._engine.kill()
        started = time.perf_counter()
        await steps.revive()
        self.seconds_awaking += time.perf_counter() - started

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Around a call that writes a part of the weights; one at a time, with a deadline. It isn't
        stopped half-way: see `shielded`."""
        async with self._running:
            self._written = True
            async with self._steps.deadline(self._config.sync_timeout, "writing weights"):
                yield

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Around a call that compares a part of the weights."""
        limit = self._config.sync_timeout
        async with self._running, self._steps.deadline(limit, "comparing weights"):
            yield

    async def commit(self, same: bool = False, others: int = -1) -> int:
        """All is written: raise the version, unless the weights are the `same`, and let requests
        flow. The version.

        others: the newest version of other ranks' engines, that all have the same from now on.
        """
        return await shielded(self._commit, same, others)

    async def _commit(self, same: bool, others: int) -> int:
        async with self._running:
            return await self._commit_written(same, others)

    async def _commit_written(self, same: bool, others: int) -> int:
        steps, before = self._steps, self._steps.version
        version = max(before, others) + (not same)
        try:
            with steps.breaking("resuming with new weights"):
                wake = self._config.wake_timeout
                async with steps.deadline(wake, "telling the engine its version"):
                    # Before scheduling resumes, so that each token is counted to its version.
                    await self._engine.set_weight_version(version)
                steps.set_version(version)
                if not same:
                    steps.gate.renew()
                await self._resume()
                steps.box.move(State.AWAKE)
            steps.gate.open()
            return version
        except BaseException:
            steps.set_version(before)
            raise
        finally:
            self._end()

    async def abort(self, error: BaseException) -> None:
        """Go back to where the engine was. If weights were written: leave the sync unfinished if it
        was interrupted, else the server down or broken."""
        await shielded(self._abort, error)

    async def _abort(self, error: BaseException) -> None:
        steps = self._steps
        if self._beginning is None:  # its caller went away before
            self.ended = True
            return
        await asyncio.wait({self._beginning})
        self._beginning.exception()  # its caller may not be there to see it
        async with self._running:  # a step that its caller has left
            pass
        if self.ended:  # by a step that failed, or a commit
            return
        try:
            unknown = await self._anything_written()  # asked by all ranks of a group
            unknown |= self.fresh or self._engine.dead or isinstance(error, EngineTimeoutError)
            syncing = steps.box.state is State.SYNCING
            if unknown or steps.version < 0 or not syncing:
                if syncing and interrupts(error) and steps.version >= 0 and not self._engine.dead:
                    steps.leave_unfinished(Unfinished(self.was_asleep, self.fresh))
                elif syncing:
                    steps.lose_or_break("syncing weights", error)
                elif not steps.down:  # then the step that failed has said so
                    steps.break_(f"syncing weights: {first_line(error)}")
            else:
                with contextlib.suppress(EngineDeadError, EngineTimeoutError):  # the state tells
                    await self._go_back()
        finally:
            self._end()

    async def _go_back(self) -> None:
        steps = self._steps
        if self.was_asleep:
            await steps.fall_asleep()
            return
        with steps.breaking("resuming"):
            await self._resume()
            steps.box.move(State.AWAKE)
        steps.gate.open()

    def _end(self) -> None:
        self.ended = True
        self._steps.transition_lock.release()

    async def _anything_written(self) -> bool:
        """By any rank of this engine; so it is taken to be where one doesn't say."""
        try:
            what = "whether anything was written"
            async with self._steps.deadline(self._config.sleep_timeout, what):
                return await self._engine.any_rank(self._written)
        except RolloutServerError:
            return True

    async def _resume(self) -> None:
        by = "restart" if self.fresh else "sleep" if self.was_asleep else "sync"
        self._steps.journal.interrupted(self._engine.running, by)
        if self.was_asleep:
            await self._wake(self._engine.wake_kv_cache, "waking the KV cache")
        else:
            resume = self._engine.readmit if self.fresh else self._engine.resume
            async with self._steps.deadline(self._config.wake_timeout, "resuming"):
                await resume()

    async def _wake(self, work: Callable[[], Coroutine[Any, Any, None]], what: str) -> None:
        started = time.perf_counter()
        async with self._steps.deadline(self._config.wake_timeout, what):
            await work()
        self.seconds_awaking += time.perf_counter() - started
