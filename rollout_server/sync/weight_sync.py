"""`sync_weights` from the trainer's side: what is sent, in which order, and what came of it.

Runs in the thread that called, since gathering a sharded policy is the trainer's own work. The
engine's side of each step is a coroutine on the server's loop (`SyncTransition`).

With several ranks, each step counts when all have done it, and fails on all if on one. They are
read from top to bottom in `WeightSync._sync`:

1. look: the policy has the tensors that the engine knows, and, on a verified sync, no NaN;
2. rest: the engine is brought to rest and its weights' memory is there;
3. write: part by part (sender.py);
4. verify, on the first sync and every N-th: the parts once more, compared;
5. commit: the version rises and requests flow. Or abort: what was is restored if nothing has been
   written, and the server is broken otherwise.

If the engine of one of them dies on the way, another is started and all begin again at 1, at rest.
A signal that raises (Ctrl-C) is held until the sync is done, or for `interrupts.GRACE` seconds;
what was written in part then is written by the next sync (`watch` sees to one).
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from rollout_server.concurrency.interrupts import GRACE, held, interrupts, waiting
from rollout_server.concurrency.loop import LoopThread
from rollout_server.config import LONGEST_BACKOFF, RolloutConfig
from rollout_server.engine.protocol import EngineProtocol
from rollout_server.errors import (
    ConfigError,
    DeadlineError,
    EngineDeadError,
    EngineTimeoutError,
    NotAvailableError,
    RankError,
    StateError,
    WeightSyncError,
)
from rollout_server.lifecycle.lifecycle import Lifecycle
from rollout_server.lifecycle.sync_transition import SyncTransition
from rollout_server.observability.events import Journal
from rollout_server.ranks import Ranks
from rollout_server.sync.sender import Sender
from rollout_server.weights.exports import Exports
from rollout_server.weights.policy import Policy
from rollout_server.weights.report import SyncReport
from rollout_server.weights.shared import SharedWeights, require_shareable
from rollout_server.weights.sources.base import Source, require_same
from rollout_server.weights.wire import TensorSpec, Written

T = TypeVar("T")

_CALL = "sync_weights()"  # as errors call it
_TRIES = 5
_DEATHS = (EngineDeadError.__name__, EngineTimeoutError.__name__)


class WeightSync:
    """Moves the policy's weights into the engine. One sync or comparison at a time."""

    def __init__(
        self,
        policy: Policy,
        config: RolloutConfig,
        loop: LoopThread,
        engine: EngineProtocol,
        lifecycle: Lifecycle,
        journal: Journal,
        specs: Mapping[str, TensorSpec],
        shared: SharedWeights | None,
        ranks: Ranks,
        group: Ranks,
        exports: Exports,
        require_room: Callable[[], None],
    ):
        """specs: the tensors that the engine was started for; shared: the memory that it has in
        common with the policy, with colocate="share"; group: of the ranks, those of this engine;
        exports: takes what the engine is given; require_room: raises if a sleeping engine can't
        have its memory back now."""
        self._policy = policy
        self._config = config
        self._loop = loop
        self._lifecycle = lifecycle
        self._journal = journal
        self._specs = specs
        self._shared = shared
        self._ranks = ranks
        self._group = group
        self._require_room = require_room
        self.sender = Sender(config, loop, engine, shared, exports)
        self._one_at_a_time = threading.Lock()
        self._syncs = 0
        self._stamp: Any = None  # of the policy, when its weights were last sent
        self._waiting: SyncTransition | None = None  # for another rank's engine, to write again

    def push(self) -> SyncReport:
        """Give the engine the policy's weights as they are now; wakes it if it sleeps.

        An engine that dies on the way is started anew, for which the other ranks wait; then all of
        them write once more.
        """
        started = time.perf_counter()
        try:
            with held(GRACE), self._turn():
                report = self._push(started)
        except BaseException as error:
            self._journal.sync_failed(error, time.perf_counter() - started)
            raise
        self._journal.synced(report)
        return report

    def _push(self, started: float) -> SyncReport:
        patience = self._config.sync_timeout
        while True:
            try:
                return self._sync(started, self._together, patience, self._due())
            except BaseException as error:
                if not self._begins_again(error):
                    raise
                patience += self._config.start_timeout + LONGEST_BACKOFF

    def restore(self) -> None:
        """The engine is down, or a sync was interrupted: start another engine, or write once more;
        with the policy's weights as they are now, and without the other ranks.

        If these have changed since the last sync, that is a new version. Nothing happens where
        there is nothing to do any more, or the policy can't be read now: the next `push` does it
        then.
        """
        with self._turn():
            while (self._lifecycle.down or self._lifecycle.unfinished) and self.readable:
                deaths = EngineDeadError, EngineTimeoutError, StateError
                with contextlib.suppress(*deaths), self._ranks.busy():
                    self._sync(
                        time.perf_counter(),
                        _alone,
                        self._config.sync_timeout,
                        verify=False,
                        restoring=True,
                    )

    def _sync(
        self,
        started: float,
        together: Callable[[str, float], AbstractContextManager[None]],
        patience: float,
        verify: bool,
        restoring: bool = False,
    ) -> SyncReport:
        """together: each step with all ranks, or `_alone`; patience: seconds in which they must
        have brought their engines to rest; restoring: the trainer hasn't asked for it, and may be
        at work."""
        limit = self._config.sync_timeout
        # 1. Look.
        with together("sync_weights()", limit):
            source = self._look(verify)
        sync, self._waiting = self._waiting or self._lifecycle.sync(restoring), None
        try:
            done = None
            if not (verify or restoring or sync.begun) and self._ranks.size == 1:
                # 2, 3 and 5 in one message, where all that is to be written is in one.
                done = self.sender.send_at_once(source, sync)
            if done is None:
                done, verify = self._in_steps(source, sync, together, patience, verify, restoring)
            version, written = done
            self._stamp = self._policy.stamp(looked=True)
        except BaseException as error:
            if self._config.restarts and _died_elsewhere(error) and not sync.ended:
                self._waiting = sync
            else:
                self._abort(sync, error)
            raise
        finally:
            self.sender.release(source)
        self._syncs += 1
        return SyncReport(
            version=version,
            bytes=written.bytes,
            seconds=time.perf_counter() - started,
            wake_seconds=sync.seconds_awaking,
            path=self._path_of(source, written.bytes),
            reason=self.sender.reason,
            tensors=written.tensors,
            verified=verify and self.sender.comparable,
        )

    def _in_steps(
        self,
        source: Source,
        sync: SyncTransition,
        together: Callable[[str, float], AbstractContextManager[None]],
        patience: float,
        verify: bool,
        restoring: bool,
    ) -> tuple[tuple[int, Written], bool]:
        """((version, what was copied), whether it was compared)."""
        limit = self._config.sync_timeout
        # 2. Rest.
        with together("sync_weights(): bringing the engine to rest", patience):
            if not sync.begun:
                with self._ranks.busy():  # it may have to start another
                    self._call(sync.begin())
        engines = [(sync.fresh, self._lifecycle.version)]
        if not restoring:
            engines = self._gather("sync_weights(): engines", engines[0], tuple[bool, int])
        if any(fresh for fresh, _ in engines):  # also on others: all are at the same part
            self.sender.reset(here=sync.fresh)
            # Beside a "resident" engine the trainer may be at a step.
            verify = not (restoring and self._config.colocate == "resident")
        # 3. Write.
        same = restoring and self._policy.stamp() == self._stamp
        with together("sync_weights(): writing", limit):
            send = self._send_steadily if restoring else self.sender.send
            written = send(source, sync)
        # 4. Verify.
        if verify:
            with together("sync_weights(): comparing", limit):
                self.sender.compare(source, sync)
        # 5. Commit.
        with together("sync_weights(): resuming", limit):
            newest = max(version for _, version in engines)
            version = self._call(sync.commit(same, newest))
        return (version, written), verify

    def _abort(self, sync: SyncTransition, error: BaseException) -> None:
        """Whether or not it was begun; after an interrupt it goes on by itself if it takes long."""
        if not interrupts(error):
            self._call(sync.abort(error))
            return
        self._ranks.fail("sync_weights()", error)
        concurrent.futures.wait({self._loop.submit(sync.abort(error), _CALL)}, GRACE)

    def _begins_again(self, error: BaseException) -> bool:
        """Whether all ranks do, since an engine has died that another can take the place of."""
        again = False
        try:
            here = isinstance(error, (EngineDeadError, EngineTimeoutError))
            if self._config.restarts and (here or _died_elsewhere(error)):
                mended = self._lifecycle.down or not here
                again = all(self._gather("sync_weights(): once more", mended, bool))
        finally:
            if self._waiting is not None and not again:
                left, self._waiting = self._waiting, None
                self._abort(left, error)
        return again

    def verify(self) -> None:
        """Compare what the engine holds with the policy; `WeightSyncError` names differences."""
        if not self.sender.comparable:
            raise NotAvailableError(
                "the engine's weights can't be compared with the policy's: they went the way of "
                f"{self.sender.path!r} ({self.sender.reason}), which may rearrange them"
            )
        limit = self._config.sync_timeout
        with held(GRACE), self._turn(), self._together("verify_weights()", limit):
            source = self._policy.source(self._config.peft)
            require_same(self._specs, source.specs, dtypes=self._shared is not None)
            try:
                self.sender.compare(source, self._lifecycle)
            finally:
                self.sender.release(source)

    def _look(self, verify: bool) -> Source:
        self._require_room()
        source = self._policy.source(self._config.peft)
        if self._shared is not None:
            require_shareable(source)  # a trainer may wrap its model after attach()
        require_same(self._specs, source.specs, dtypes=self._shared is not None)
        if source.adapter is not None and not self.sender.comparable:
            raise ConfigError(
                f"peft='adapter' needs weights that can be copied to where they are used, but they "
                f"go the way of {self.sender.path!r} ({self.sender.reason}); use peft='merge'"
            )
        check = self._config.check_finite
        if (check == "always" or (check == "verified" and verify)) and (bad := source.not_finite()):
            raise WeightSyncError(
                f"the policy's weights hold NaN or infinity in {bad}; nothing was written. Look at "
                "the learning rate and the gradients, or set check_finite='never'"
            )
        return source

    def _send_steadily(self, source: Source, sync: SyncTransition) -> Written:
        """As `Sender.send`, beside a trainer that may be in an optimizer step: then once more."""
        for _ in range(_TRIES):
            before = self._policy.stamp()
            done = self.sender.send(source, sync)
            if source.staged_from is not None or self._policy.stamp() == before:
                return done
        raise WeightSyncError(
            f"the policy's weights changed each of {_TRIES} times that they were copied"
        )

    @property
    def readable(self) -> bool:
        """Whether the policy can be read at any time, whatever the trainer and other ranks do."""
        source = self._policy.source(self._config.peft)
        at_work = self._config.colocate == "resident" or self._lifecycle.unfinished
        merged = source.staged_from is not None and at_work
        return not source.collective and not merged and self._group.size == 1

    def _due(self) -> bool:
        every = self._config.verify_every
        return self._syncs == 0 or (every > 0 and self._syncs % every == 0)

    @property
    def _allowed(self) -> float:
        return self._config.transition_time

    def _path_of(self, source: Source, size: int) -> str:
        alone = source.adapter is not None and size == source.adapter.bytes
        return "adapter" if alone else self.sender.path

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.call(work, self._config.transition_time, _CALL)

    def _gather(self, what: str, value: T, kind: Any) -> list[T]:
        return self._ranks.gather(what, value, self._config.sync_timeout, kind)

    @contextlib.contextmanager
    def _together(self, what: str, timeout: float) -> Iterator[None]:
        """The block succeeds on all ranks, or raises on all."""
        with self._ranks.together(what, timeout), self._group.together(what, timeout):
            yield

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        lock = self._one_at_a_time
        if not waiting(lambda seconds: lock.acquire(timeout=seconds), self._allowed):
            raise DeadlineError(
                f"another sync_weights() or verify_weights() hasn't ended within "
                f"{self._allowed:g} s"
            )
        try:
            yield
        finally:
            self._one_at_a_time.release()


def _alone(what: str, timeout: float) -> AbstractContextManager[None]:
    """`WeightSync._together` of one rank that doesn't ask the others."""
    return contextlib.nullcontext()


def _died_elsewhere(error: BaseException) -> bool:
    """Whether another rank failed since its engine did."""
    return isinstance(error, RankError) and error.kind in _DEATHS
