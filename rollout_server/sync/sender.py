"""The policy's weights on their way into the engine: written part by part, and compared.

In the thread that syncs; while the engine copies one part, the next is gathered.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch

from rollout_server.concurrency.loop import LoopThread
from rollout_server.config import RolloutConfig
from rollout_server.engine.engine import Engine
from rollout_server.engine.group import GroupEngine
from rollout_server.errors import (
    ConfigError,
    RolloutServerError,
    UnsupportedModelError,
    WeightSyncError,
    first_line,
)
from rollout_server.lifecycle.sync_transition import SyncTransition
from rollout_server.weights.shared import SharedWeights
from rollout_server.weights.sources.base import Adapter, Source
from rollout_server.weights.staging import Staging, Wanted
from rollout_server.weights.transport import Exporter
from rollout_server.weights.wire import Part


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
        engine: Engine | GroupEngine,
        shared: SharedWeights | None,
    ):
        """shared: the memory that engine and policy have in common, with colocate="share"."""
        self._config = config
        self._loop = loop
        self._engine = engine
        self._shared = shared
        self._exporter = Exporter()
        self._staging = Staging(config.sync_bucket_bytes, _wanted(engine.description))
        self._frozen: tuple | None = None  # what frozen tensors the engine was given
        self._adapter_given = False
        if shared is not None:
            self.path, self.reason = "share", ""
        else:
            self.path, self.reason = _path(config, engine.description)

    def renew(self, here: bool) -> None:
        """An engine is a new one, `here` or another rank's: all ranks send all parts."""
        self._frozen = None
        if here:
            self._exporter = Exporter()

    def call(self, work: Any) -> Any:
        """What a coroutine on the server's loop gives; `DeadlineError`."""
        return self._result(self.submit(work))

    def submit(self, work: Any) -> Future:
        """Have a coroutine run on the server's loop, and go on."""
        return self._loop.submit(work, "sync_weights()")

    def _result(self, future: Future) -> Any:
        return self._loop.result(future, self._config.transition_time, "sync_weights()")

    def put(self, source: Source, sync: SyncTransition) -> tuple[int, int]:
        """(bytes, tensors) that were copied."""
        if self._shared is not None:
            done = _sum(self._shared.refresh(source.tensors), self._write_rest(source, sync))
            self._shared.finish()
        else:
            done = self._write(self._due_parts(source, sync), source, sync)
        if source.adapter is not None:
            done = _sum(done, self._write_adapter(source.adapter, sync))
        self._frozen = source.frozen_state
        return done

    def _write_rest(self, source: Source, sync: SyncTransition) -> tuple[int, int]:
        rest = self._shared.rest(source)
        return self._write(rest.parts(self._staging), rest, sync)

    def _due_parts(self, source: Source, sync: SyncTransition) -> Iterator[Part]:
        """All parts, but for frozen ones that the engine still has."""
        if sync.was_asleep or self._frozen is None or self._frozen != source.frozen_state:
            return source.parts(self._staging)
        return source.trained_parts(self._staging)

    def _write_adapter(self, adapter: Adapter, sync: SyncTransition) -> tuple[int, int]:
        """The adapter's tensors; vLLM's buffers are made anew at first and after each sleep."""
        fresh = sync.was_asleep or sync.fresh or not self._adapter_given
        message = self._exporter.export(adapter.part())
        scaling = dict(adapter.scaling)
        work = sync.write(lambda engine: engine.write_adapter(message, scaling, fresh))
        report = self.call(work)
        self._adapter_given = True
        return report["bytes"], report["tensors"]

    def _write(
        self, parts: Iterator[Part], source: Source, sync: SyncTransition
    ) -> tuple[int, int]:
        running: deque[Future] = deque()
        size = tensors = 0

        def finish(but: int) -> None:
            nonlocal size, tensors
            while len(running) > but:
                report = self._result(running.popleft())
                size, tensors = size + report["bytes"], tensors + report["tensors"]

        try:
            with contextlib.closing(_to_the_end(parts, source.collective)) as walk:
                for part in walk:
                    work = self._writing(self._exporter.export(part), part.number == 0, part.last)
                    running.append(self.submit(sync.write(work)))
                    finish(but=1)  # the memory of the part before this one is written next
                finish(but=0)
        finally:  # what was begun ends, so that ranks with one engine stay in step
            while running:
                with contextlib.suppress(Exception):
                    self._result(running.popleft())
        return size, tensors

    def tidy(self, source: Source) -> None:
        """Give the buckets back, here and in the engine."""
        first = 0 if self._shared is not None else source.staged_from
        if first is not None and self._exporter.forget(first):
            self._staging.release()
            with contextlib.suppress(RolloutServerError):  # an engine that is broken has told so
                self.call(self._engine.forget_weights(first))

    def _writing(self, message: bytes, first: bool, last: bool) -> Callable[[Engine], Any]:
        if self.path in ("plan", "share"):
            return lambda engine: engine.write_weights(message)
        layerwise = self.path == "layerwise"
        return lambda engine: engine.reload_weights(message, first, last, layerwise)

    def compare(self, source: Source, read: Callable) -> None:
        """`WeightSyncError` names what differs, of what the engine holds as it was sent. read:
        gives work with the engine its turn."""
        differ: list[str] = []
        parts = source.parts(self._staging)
        with contextlib.closing(_to_the_end(parts, source.collective)) as walk:
            for part in walk:
                message = self._exporter.export(part)
                differ += self.call(read(lambda engine, m=message: engine.compare_weights(m)))
        if source.adapter is not None:
            message = self._exporter.export(source.adapter.part())
            differ += self.call(read(lambda engine: engine.compare_adapter(message)))
        if differ:
            raise WeightSyncError(
                f"the engine's weights differ from the trainer's in {list(dict.fromkeys(differ))}"
            )

    @property
    def comparable(self) -> bool:
        """Whether the engine has the policy's tensors as they are."""
        return self.path in ("plan", "share")


def _path(config: RolloutConfig, description: Mapping[str, Any]) -> tuple[str, str]:
    """(path, reason) by the options and what the engine says of itself."""
    obstacles = description["obstacles"]
    if description["device"] == "cpu" and description["repacked"]:
        raise UnsupportedModelError(
            f"{_some(description['repacked'])}; a reload on vLLM's CPU engine doesn't renew what "
            "it has packed: serve a dense model that isn't quantised and leave worker_cls out of "
            "engine_args, or use a GPU"
        )
    if config.sync_path not in ("auto", "plan"):
        return config.sync_path, f"sync_path={config.sync_path!r}"
    if not obstacles:
        return "plan", ""
    shown = _some(obstacles)
    if config.sync_path == "plan":
        raise ConfigError(
            f"sync_path='plan', but weights can't be copied to where they are used: {shown}; "
            "leave sync_path='auto' to fall back on vLLM's layerwise reload"
        )
    return "layerwise", shown


def _some(lines: list[str]) -> str:
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _to_the_end(parts: Iterator[Part], collective: bool) -> Iterator[Part]:
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


def _sum(*counts: tuple[int, int]) -> tuple[int, int]:
    return tuple(map(sum, zip(*counts, strict=True)))


def _wanted(description: Mapping[str, Any]) -> Wanted:
    return Wanted(
        {name: getattr(torch, dtype) for name, dtype in description["dtypes"].items()},
        set(description["splittable"]),
    )
