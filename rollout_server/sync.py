"""`sync_weights` from the trainer's side: what is sent, in which order, and what came of it.

Runs in the thread that called, since gathering a sharded policy is the trainer's own work. The
engine's side of each step is a coroutine on the server's loop (`lifecycle.SyncTransition`).

1. look: the policy has the tensors that the engine knows, and, on a verified sync, no NaN;
2. begin: the engine is brought to rest and its weights' memory is there;
3. write: part by part; while the engine copies one, the next is gathered;
4. verify, on the first sync and every N-th: the parts once more, compared;
5. commit: the version rises and requests flow. Or abort: what was is restored if nothing has been
   written, and the server is broken otherwise.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from rollout_server.config import RolloutConfig
from rollout_server.engine.engine import Engine
from rollout_server.engine.loop import LoopThread
from rollout_server.engine.plan import TensorSpec
from rollout_server.errors import ConfigError, DeadlineError, NotAvailableError, WeightSyncError
from rollout_server.lifecycle import Lifecycle, SyncTransition
from rollout_server.policy import Policy
from rollout_server.weights.shared import SharedWeights
from rollout_server.weights.source import Source, require_same
from rollout_server.weights.transport import Exporter


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    Attributes:
        version: policy version from now on.
        bytes: how much was copied into the engine, as it is in the trainer.
        seconds: from the call until requests flowed again.
        wake_seconds: of these, those that waking took; 0 if the engine was awake.
        path: how the weights went. "plan": copied to where they are used; "share": they are there
            already; "layerwise": vLLM's layerwise reload; "load_weights": vLLM's loader.
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
        loop: LoopThread,
        engine: Engine,
        lifecycle: Lifecycle,
        specs: Mapping[str, TensorSpec],
        shared: SharedWeights | None,
    ):
        """specs: the tensors that the engine was started for; shared: the memory that it has in
        common with the policy, with colocate="share"."""
        self._policy = policy
        self._config = config
        self._loop = loop
        self._lifecycle = lifecycle
        self._specs = specs
        self._shared = shared
        self._exporter = Exporter()
        self._one_at_a_time = threading.Lock()
        self._syncs = 0
        if shared is not None:
            self.path, self.reason = "share", ""
        else:
            self.path, self.reason = _path(config, engine.description["obstacles"])

    def push(self) -> SyncReport:
        """Give the engine the policy's weights as they are now; wakes it if it sleeps."""
        started = time.perf_counter()
        with self._turn():
            verify = self._due()
            source = self._look(verify)
            sync = self._call(self._lifecycle.begin_sync())
            try:
                size, tensors = self._put(source, sync)
                if verify:
                    self._compare(source, sync.read)
                version = self._call(sync.commit())
            except BaseException as error:
                self._call(sync.abort(_first_line(error)))
                raise
            self._syncs += 1
        return SyncReport(
            version=version,
            bytes=size,
            seconds=time.perf_counter() - started,
            wake_seconds=sync.seconds_awaking,
            path=self.path,
            reason=self.reason,
            tensors=tensors,
            verified=verify and self._comparable,
        )

    def verify(self) -> None:
        """Compare what the engine holds with the policy; `WeightSyncError` names differences."""
        if not self._comparable:
            raise NotAvailableError(
                "the engine's weights can't be compared with the policy's: they went the way of "
                f"{self.path!r} ({self.reason}), which may rearrange them"
            )
        with self._turn():
            source = self._policy.source()
            require_same(self._specs, source.specs)
            self._compare(source, self._read)

    def _look(self, verify: bool) -> Source:
        source = self._policy.source()
        require_same(self._specs, source.specs)
        check = self._config.check_finite
        if (check == "always" or (check == "verified" and verify)) and (bad := source.not_finite()):
            raise WeightSyncError(
                f"the policy's weights hold NaN or infinity in {bad}; nothing was written. Look at "
                "the learning rate and the gradients, or set check_finite='never'"
            )
        return source

    def _put(self, source: Source, sync: SyncTransition) -> tuple[int, int]:
        """(bytes, tensors) that were copied."""
        if self._shared is None:
            return self._write(source, sync)
        moved, number = self._shared.refresh(source.tensors)
        rest, others = self._write(self._shared.rest(source), sync)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the trainer has written is there
        return moved + rest, number + others

    def _write(self, source: Source, sync: SyncTransition) -> tuple[int, int]:
        running: deque[Future] = deque()
        size = tensors = 0

        def finish_one() -> None:
            nonlocal size, tensors
            report = self._loop.result(running.popleft(), self._allowed, "sync_weights()")
            size, tensors = size + report["bytes"], tensors + report["tensors"]

        for part in source.parts():
            message = self._exporter.export(part)
            work = self._writing(message, first=part.number == 0, last=part.last)
            running.append(self._loop.submit(sync.write(work), "sync_weights()"))
            while len(running) > 1:  # the memory of the one before is written next
                finish_one()
        while running:
            finish_one()
        return size, tensors

    def _writing(self, message: bytes, first: bool, last: bool) -> Callable[[Engine], Any]:
        if self.path in ("plan", "share"):
            return lambda engine: engine.write_weights(message)
        layerwise = self.path == "layerwise"
        return lambda engine: engine.reload_weights(message, first, last, layerwise)

    def _compare(self, source: Source, read: Callable) -> None:
        if not self._comparable:
            return
        differ: list[str] = []
        for part in source.parts():
            message = self._exporter.export(part)
            differ += self._call(read(lambda engine, m=message: engine.compare_weights(m)))
        if self._shared is not None:
            self._exporter.forget()  # so does the engine
        if differ:
            raise WeightSyncError(
                f"the engine's weights differ from the trainer's in {list(dict.fromkeys(differ))}"
            )

    @property
    def _comparable(self) -> bool:
        return self.path in ("plan", "share")

    async def _read(self, work: Callable) -> Any:
        async with self._lifecycle.reading() as engine:
            return await work(engine)

    def _due(self) -> bool:
        every = self._config.verify_every
        return self._syncs == 0 or (every > 0 and self._syncs % every == 0)

    def _call(self, work: Any) -> Any:
        return self._loop.call(work, self._allowed, "sync_weights()")

    @property
    def _allowed(self) -> float:
        return self._config.transition_time

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._one_at_a_time.acquire(timeout=self._allowed):
            raise DeadlineError(
                f"another sync_weights() or verify_weights() hasn't ended within "
                f"{self._allowed:g} s"
            )
        try:
            yield
        finally:
            self._one_at_a_time.release()


def _path(config: RolloutConfig, obstacles: list[str]) -> tuple[str, str]:
    if config.sync_path not in ("auto", "plan"):
        return config.sync_path, f"sync_path={config.sync_path!r}"
    if not obstacles:
        return "plan", ""
    shown = "; ".join(obstacles[:3]) + (f"; and {len(obstacles) - 3} more" * (len(obstacles) > 3))
    if config.sync_path == "plan":
        raise ConfigError(
            f"sync_path='plan', but weights can't be copied to where they are used: {shown}; "
            "leave sync_path='auto' to fall back on vLLM's layerwise reload"
        )
    return "layerwise", shown


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
