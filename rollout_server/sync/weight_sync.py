"""`sync_weights` from the trainer's side: what is sent, in which order, and what came of it.

Runs in the thread that called, since gathering a sharded policy is the trainer's own work. The
engine's side of each step is a coroutine on the server's loop (`transition.SyncTransition`).

With several ranks, each counts when all have done it, and fails on all if on one.

1. look: the policy has the tensors that the engine knows, and, on a verified sync, no NaN;
2. begin: the engine is brought to rest and its weights' memory is there;
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.concurrency.interrupts import GRACE, held, interrupts, waiting
from rollout_server.config import LONGEST_BACKOFF, RolloutConfig
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
from rollout_server.ranks import Ranks
from rollout_server.sync.sender import Sender
from rollout_server.weights.policy import Policy
from rollout_server.weights.shared import SharedWeights, require_shareable
from rollout_server.weights.sources.base import Source, require_same
from rollout_server.weights.wire import TensorSpec

_TRIES = 5
_DEATHS = (EngineDeadError.__name__, EngineTimeoutError.__name__)


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    Attributes:
        version: policy version from now on.
        bytes: how much was copied into the engine, as it is in the trainer.
        seconds: from the call until requests flowed again.
        wake_seconds: of these, those that waking took; 0 if the engine was awake.
        path: how the weights went. "plan": copied to where they are used; "share": they are there
            already; "adapter": a LoRA adapter alone, the base being there; "layerwise": vLLM's
            layerwise reload; "load_weights": vLLM's loader.
        reason: why one of the last two.
        tensors: number of tensors, or of pieces of them.
        verified: whether what the engine holds was compared with the policy.
    """

    version: int
    bytes: int
    seconds: float
    wake_seconds: float
    path: str
    reason: str
    tensors: int
    verified: bool


class WeightSync:
    """Moves the policy's weights into the engine. One sync or comparison at a time."""

    def __init__(
        self,
        policy: Policy,
        config: RolloutConfig,
        sender: Sender,
        lifecycle: Lifecycle,
        specs: Mapping[str, TensorSpec],
        shared: SharedWeights | None,
        ranks: Ranks,
        group: Ranks,
    ):
        """specs: the tensors that the engine was started for; shared: the memory that it has in
        common with the policy, with colocate="share"; group: of the ranks, those of this engine."""
        self._policy = policy
        self._config = config
        self.sender = sender
        self._lifecycle = lifecycle
        self._specs = specs
        self._shared = shared
        self._ranks = ranks
        self._group = group
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
        patience = self._config.sync_timeout
        with held(GRACE), self._turn():
            while True:
                try:
                    return self._push(started, self._due(), patience)
                except BaseException as error:
                    if not self._begins_again(error):
                        raise
                    patience += self._config.start_timeout + LONGEST_BACKOFF

    def restore(self) -> None:
        """The engine is down, or a sync was interrupted: start another engine, or write once more;
        with the policy's weights as they are now.

        If these have changed since the last sync, that is a new version. Nothing happens where
        there is nothing to do any more, or the policy can't be read now: the next `push` does it
        then.
        """
        with self._turn():
            while (self._lifecycle.down or self._lifecycle.unfinished) and self.readable:
                deaths = EngineDeadError, EngineTimeoutError, StateError
                with contextlib.suppress(*deaths), self._ranks.busy():
                    self._push(time.perf_counter(), verify=False)

    def _push(self, started: float, verify: bool, patience: float | None = None) -> SyncReport:
        """patience: for how long other ranks' engines are waited for; None: this one is alone with
        an engine to restore."""
        restoring = patience is None
        together = _alone if restoring else self._together
        with together("sync_weights()"):
            source = self._look(verify)
        sync, self._waiting = self._waiting or self._lifecycle.sync(restoring), None
        try:
            with together("sync_weights(): bringing the engine to rest", patience):
                if not sync.begun:
                    with self._ranks.busy():  # it may have to start another
                        self.sender.call(sync.begin())
            told = [[sync.fresh, self._lifecycle.version]]
            if not restoring:
                told = self._gather("sync_weights(): engines", told[0])
            if any(fresh for fresh, _ in told):  # also on others: all are at the same part
                self.sender.renew(here=sync.fresh)
                # Beside a "resident" engine the trainer may be at a step.
                verify = not (restoring and self._config.colocate == "resident")
            same = restoring and self._policy.stamp() == self._stamp
            with together("sync_weights(): writing"):
                size, tensors = (
                    self._put_whole(source, sync) if restoring else self.sender.put(source, sync)
                )
            if verify:
                with together("sync_weights(): comparing"):
                    self.sender.compare(source, sync.read)
            with together("sync_weights(): resuming"):
                version = self.sender.call(sync.commit(same, max(version for _, version in told)))
            self._stamp = self._policy.stamp()
        except BaseException as error:
            if self._config.restarts and _died_elsewhere(error) and not sync.ended:
                self._waiting = sync
            else:
                self._abort(sync, error)
            raise
        finally:
            self.sender.tidy(source)
        self._syncs += 1
        return SyncReport(
            version=version,
            bytes=size,
            seconds=time.perf_counter() - started,
            wake_seconds=sync.seconds_awaking,
            path=self._path_of(source, size),
            reason=self.sender.reason,
            tensors=tensors,
            verified=verify and self.sender.comparable,
        )

    def _abort(self, sync: SyncTransition, error: BaseException) -> None:
        """Whether or not it was begun; after an interrupt it goes on by itself if it takes long."""
        if not interrupts(error):
            self.sender.call(sync.abort(error))
            return
        self._ranks.fail("sync_weights()", error)
        concurrent.futures.wait({self.sender.submit(sync.abort(error))}, GRACE)

    def _begins_again(self, error: BaseException) -> bool:
        """Whether all ranks do, since an engine has died that another can take the place of."""
        again = False
        try:
            here = isinstance(error, (EngineDeadError, EngineTimeoutError))
            if self._config.restarts and (here or _died_elsewhere(error)):
                mended = self._lifecycle.down or not here
                again = all(self._gather("sync_weights(): once more", mended))
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
        with held(GRACE), self._turn(), self._together("verify_weights()"):
            source = self._policy.source(self._config.peft)
            require_same(self._specs, source.specs, dtypes=self._shared is not None)
            try:
                self.sender.compare(source, self._read)
            finally:
                self.sender.tidy(source)

    def _look(self, verify: bool) -> Source:
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

    def _put_whole(self, source: Source, sync: SyncTransition) -> tuple[int, int]:
        """As `Sender.put`, beside a trainer that may be in an optimizer step: then once more."""
        for _ in range(_TRIES):
            before = self._policy.stamp()
            done = self.sender.put(source, sync)
            if source.staged_from is not None or self._policy.stamp() == before:
                return done
        raise WeightSyncError(
            f"the policy's weights changed each of {_TRIES} times that they were copied"
        )

    async def _read(self, work: Callable) -> Any:
        async with self._lifecycle.reading() as engine:
            return await work(engine)

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

    def _gather(self, what: str, value: Any) -> list[Any]:
        return self._ranks.gather(what, value, self._config.sync_timeout)

    @contextlib.contextmanager
    def _together(self, what: str, timeout: float | None = None) -> Iterator[None]:
        timeout = timeout or self._config.sync_timeout
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


def _alone(*_: Any) -> contextlib.AbstractContextManager:
    """`WeightSync._together` of one rank that doesn't ask the others."""
    return contextlib.nullcontext()


def _died_elsewhere(error: BaseException) -> bool:
    """Whether another rank failed since its engine did."""
    return isinstance(error, RankError) and error.kind in _DEATHS
