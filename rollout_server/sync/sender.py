"""The policy's weights on their way into the engine: written part by part, and compared.

In the thread that syncs; while the engine copies one part, the next is gathered.
"""

import contextlib
from collections import deque
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from rollout_server.concurrency.loop import LoopThread
from rollout_server.config import RolloutConfig
from rollout_server.engine.protocol import EngineProtocol
from rollout_server.errors import (
    ConfigError,
    RolloutServerError,
    UnsupportedModelError,
    WeightSyncError,
    first_line,
)
from rollout_server.lifecycle.steps import shielded
from rollout_server.lifecycle.sync_transition import SyncTransition
from rollout_server.weights.exports import Exports, collect
from rollout_server.weights.shared import SharedWeights
from rollout_server.weights.sources.base import Source
from rollout_server.weights.staging import EngineTensorInfo, Staging
from rollout_server.weights.transport import Exporter
from rollout_server.weights.wire import (
    Compared,
    EngineDescription,
    Part,
    Parts,
    Written,
    united,
)

T = TypeVar("T")


class Readable(Protocol):
    """Where the engine's weights can be read: a sync, or the lifecycle between two of them."""

    def reading(self) -> AbstractAsyncContextManager[None]:
        """Around a call that reads them, which nothing writes meanwhile."""


class Sender:
    """Of one engine. Owns the buckets, the handles that the engine has been given, and what of
    frozen weights and adapters it has.

    Attributes:
        path, reason: how weights go and, unless they can be copied to where they are used, why;
            see `sync.SyncReport`.
    """

    def __init__(
        self,
        config: RolloutConfig,
        loop: LoopThread,
        engine: EngineProtocol,
        shared: SharedWeights | None,
        exports: Exports,
    ):
        """shared: the memory that engine and policy have in common, with colocate="share"; exports:
        takes what the engine is given."""
        self._config = config
        self._loop = loop
        self._engine = engine
        self._shared = shared
        self._exports = exports
        self._exporter = Exporter(exports)
        self._staging = Staging(
            config.sync_bucket_bytes,
            EngineTensorInfo(engine.description.dtypes, engine.description.splittable),
        )
        self._frozen: tuple[Any, ...] | None = None  # what frozen tensors the engine was given
        self._adapter_given = False
        if shared is not None:
            self.path, self.reason = "share", ""
        else:
            self.path, self.reason = _path(config, engine.description)

    def reset(self, here: bool) -> None:
        """An engine is a new one, `here` or another rank's: all ranks send all parts."""
        self._frozen = None
        if here:
            self._exporter = Exporter(self._exports)

    def send(self, source: Source, sync: SyncTransition) -> Written:
        """Write the policy's tensors into the engine, which `sync` has brought to rest; what was
        copied."""
        # First, for other ranks gather it too, and one of them may fail on the way.
        adapter = None if source.adapter is None else source.adapter.part()
        if self._shared is not None:
            done = _sum(Written(*self._shared.refresh(source.tensors)), self._rest(source, sync))
            self._shared.finish()
        else:
            done = self._write(self._due_parts(source, sync), source, sync)
        if source.adapter is not None and adapter is not None:
            done = _sum(done, self._write_adapter(adapter, source.adapter.scaling, sync))
        self._frozen = source.frozen_state
        return done

    def send_at_once(self, source: Source, sync: SyncTransition) -> tuple[int, Written] | None:
        """(version, what was copied) of a sync in one message, with which it is done; None where it
        must go, or go on, step by step: with several parts, or an engine that isn't awake."""
        message: bytes | None = None
        if not self._engine.description.refits or source.adapter is not None:
            return None
        if self._shared is not None:
            if not self._shared.holds_all or self._shared.left(source.tensors):
                return None
            self._shared.finish()
        elif self.path == "plan" and source.staged_from is None:
            (part,) = source.parts(self._staging)
            message = self._exporter.export(part)
        else:
            return None
        return self._result(self._submit(sync.refit(message)))

    def _rest(self, source: Source, sync: SyncTransition) -> Written:
        """Of a policy whose memory is the engine's: what isn't."""
        assert self._shared is not None
        rest = self._shared.rest(source)
        return self._write(rest.parts(self._staging), rest, sync)

    def _due_parts(self, source: Source, sync: SyncTransition) -> Parts:
        """All parts, but for frozen ones that the engine still has."""
        if sync.was_asleep or self._frozen is None or self._frozen != source.frozen_state:
            return source.parts(self._staging)
        return source.trained_parts(self._staging)

    def _write_adapter(
        self, adapter: Part, scaling: Mapping[str, float], sync: SyncTransition
    ) -> Written:
        """The adapter's tensors; vLLM's buffers are made anew at first and after each sleep."""
        fresh = sync.was_asleep or sync.fresh or not self._adapter_given
        message = self._exporter.export(adapter)

        async def write() -> Written:
            async with sync.writing():
                return await self._engine.write_adapter(message, scaling, fresh)

        report = self._result(self._submit(shielded(write)))
        self._adapter_given = True
        return report

    def _write(self, parts: Parts, source: Source, sync: SyncTransition) -> Written:
        running: deque[Future[Written]] = deque()
        done = Written(0, 0)

        def finish(but: int) -> None:
            nonlocal done
            while len(running) > but:
                done = _sum(done, self._result(running.popleft()))

        try:
            with contextlib.closing(_to_the_end(parts, source.collective)) as walk:
                for part in walk:
                    message = self._exporter.export(part)
                    first = part.number == 0
                    work = shielded(self._write_part, message, first, part.last, sync)
                    running.append(self._submit(work))
                    finish(but=1)  # the memory of the part before this one is written next
                finish(but=0)
        finally:  # what was begun ends, so that ranks with one engine stay in step
            while running:
                with contextlib.suppress(Exception):
                    self._result(running.popleft())
        return done

    async def _write_part(
        self, message: bytes, first: bool, last: bool, sync: SyncTransition
    ) -> Written:
        async with sync.writing():
            if self.path in ("plan", "share"):
                return await self._engine.write_weights(message)
            layerwise = self.path == "layerwise"
            return await self._engine.reload_weights(message, first, last, layerwise)

    def compare(self, source: Source, at: Readable) -> None:
        """`WeightSyncError` names what differs, of what the engine holds as it was sent. at: the
        sync, or between two syncs the lifecycle."""
        differ: list[str] = []
        adapter = None if source.adapter is None else source.adapter.part()
        parts = source.parts(self._staging)
        with contextlib.closing(_to_the_end(parts, source.collective)) as walk:
            for part in walk:
                message = self._exporter.export(part)
                found = self._result(self._submit(self._compare_part(message, at)))
                differ += found.mismatched
        if adapter is not None:
            message = self._exporter.export(adapter)
            differ += self._result(self._submit(self._compare_adapter(message, at))).mismatched
        if differ:
            raise WeightSyncError(
                f"the engine's weights differ from the trainer's in {united([differ])}"
            )

    async def _compare_part(self, message: bytes, at: Readable) -> Compared:
        async with at.reading():
            return await self._engine.compare_weights(message)

    async def _compare_adapter(self, message: bytes, at: Readable) -> Compared:
        async with at.reading():
            return await self._engine.compare_adapter(message)

    def release(self, source: Source) -> None:
        """Give the buckets back, in the engine and then here."""
        first = 0 if self._shared is not None else source.staged_from
        if first is None or not self._exporter.has(first):
            return
        with contextlib.suppress(RolloutServerError):  # an engine that is broken has told so
            self._result(self._submit(self._engine.forget_weights(first)))
            self._exports.let_go(lambda part: isinstance(part, int) and part >= first)
        self._exporter.forget(first)
        self._staging.release()
        collect()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have a coroutine run on the server's loop, and go on."""
        return self._loop.submit(work, "sync_weights()")

    def _result(self, future: Future[T]) -> T:
        return self._loop.result(future, self._config.transition_time, "sync_weights()")

    @property
    def comparable(self) -> bool:
        """Whether the engine has the policy's tensors as they are."""
        return self.path in ("plan", "share")


def _path(config: RolloutConfig, description: EngineDescription) -> tuple[str, str]:
    """(path, reason) by the options and what the engine says of itself."""
    unsupported_reasons = description.unsupported_reasons
    if description.device == "cpu" and description.repacked:
        raise UnsupportedModelError(
            f"{_some(description.repacked)}; a reload on vLLM's CPU engine doesn't renew what "
            "it has packed: serve a dense model that isn't quantised and leave worker_cls out of "
            "engine_args, or use a GPU"
        )
    if config.sync_path not in ("auto", "plan"):
        return config.sync_path, f"sync_path={config.sync_path!r}"
    if not unsupported_reasons:
        return "plan", ""
    shown = _some(unsupported_reasons)
    if config.sync_path == "plan":
        raise ConfigError(
            f"sync_path='plan', but weights can't be copied to where they are used: {shown}; "
            "leave sync_path='auto' to fall back on vLLM's layerwise reload"
        )
    return "layerwise", shown


def _some(lines: list[str]) -> str:
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _to_the_end(parts: Parts, collective: bool) -> Parts:
    """The parts; if they are left early, on to their end where other ranks gather them too."""
    try:
        for part in parts:  # noqa: UP028, since `yield from` would close them first
            yield part
    except RuntimeError as error:  # of torch.distributed
        if not collective:
            raise
        raise WeightSyncError(
            f"gathering the policy's weights failed ({first_line(error)}); another rank may have "
            "ended: look at its output"
        ) from error
    finally:
        if collective:
            for _ in parts:
                pass
        parts.close()


def _sum(one: Written, other: Written) -> Written:
    return Written(one.bytes + other.bytes, one.tensors + other.tensors)
