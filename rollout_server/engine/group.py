"""Tensor parallel: one engine for a group of ranks, with a worker on each one's device.

The group's first rank starts the engine and serves it. Every rank has a `GroupEngine`, on which all
make the same calls in the same order; a call is done when the first rank's engine has done it, and
fails on all if on one. Of weights, each rank tells of its own memory, which the worker on the same
device opens. `generate` alone is each rank's own: the others' prompts go to the first through a
socket.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from rollout_server.concurrency.loop import in_thread
from rollout_server.engine.engine import Engine
from rollout_server.engine.log import LOG_LINES
from rollout_server.engine.relay import Relay, relayed
from rollout_server.errors import DeadlineError, NotAvailableError, StateError
from rollout_server.ranks import Ranks
from rollout_server.weights.wire import Compared, EngineDescription, WorkerDescription, Written

T = TypeVar("T")


class _Served(msgspec.Struct, frozen=True):
    """What the first rank tells the others of its engine; relay: the address of its socket."""

    description: EngineDescription
    pid: int
    max_model_len: int
    relay: str


class _OfRank(msgspec.Struct, frozen=True):
    """What one rank tells of its part: the message for the worker at `place`."""

    place: str
    message: bytes


class GroupEngine:
    """The engine of a group of ranks, see `EngineProtocol`. Made by `join`, on each of them."""

    description: EngineDescription
    pid: int
    max_model_len: int
    _address: str  # of the first rank's relay
    _place: str

    def __init__(self, engine: Engine | None, relay: Relay | None, group: Ranks, timeout: float):
        self._engine = engine  # of the first rank
        self._relay = relay
        self._group = group
        self._timeout = timeout

    @classmethod
    async def join(
        cls, engine: Engine | None, group: Ranks, place: str, timeout: float
    ) -> "GroupEngine":
        """All ranks of the group at once, the first with its engine.

        place: see `weights.transport.place`; timeout: seconds for each call, in which all must
        come and the engine be done.
        """
        relay = None if engine is None else await Relay.open(engine)
        self = cls(engine, relay, group, timeout)
        served = None
        if engine is not None and relay is not None:
            served = _Served(engine.description, engine.pid, engine.max_model_len, relay.address)
        kind = _Served | None
        served = (await self._gather("attach(): engine", served, kind))[0]
        assert served is not None
        self.description, self.pid = served.description, served.pid
        self.max_model_len = served.max_model_len
        self._address, self._place = served.relay, place
        return self

    @property
    def worker(self) -> WorkerDescription:
        """The worker on this rank's device."""
        return self.description.workers[self._group.rank]

    @property
    def client(self) -> Any:
        return self._serving().client

    @property
    def dead(self) -> bool:
        return self._engine is not None and self._engine.dead

    @property
    def condition(self) -> str:
        return "that of another rank" if self._engine is None else self._engine.condition

    @property
    def running(self) -> int:
        return 0 if self._engine is None else self._engine.running

    @property
    def resident_bytes(self) -> int:
        return 0 if self._engine is None else self._engine.resident_bytes

    def take_kv_cache_peak(self) -> float:
        return 0.0 if self._engine is None else self._engine.take_kv_cache_peak()

    def log_tail(self, lines: int = LOG_LINES) -> str:
        return "" if self._engine is None else self._engine.log_tail(lines)

    def require_alive(self) -> None:
        if self._engine is not None:
            self._engine.require_alive()

    async def generate(
        self,
        prompt: list[int],
        fields: Mapping[str, Any],
        request_id: str,
        images: Sequence[Any] = (),
    ) -> list[Any]:
        if self._engine is not None:
            return await self._engine.generate(prompt, fields, request_id, images)
        request_id = f"rank{self._group.rank}-{request_id}"
        return await relayed(self._address, (prompt, dict(fields), request_id, list(images)))

    async def drain(self) -> None:
        await self._do("letting running requests finish", lambda engine: engine.drain())

    async def pause(self) -> None:
        await self._do("bringing running requests to rest", lambda engine: engine.pause())

    async def resume(self) -> None:
        await self._do("resuming", lambda engine: engine.resume())

    async def sleep(self) -> None:
        await self._do("falling asleep", lambda engine: engine.sleep())

    async def wake_weights(self) -> None:
        await self._do("waking the weights", lambda engine: engine.wake_weights())

    async def wake_kv_cache(self) -> None:
        await self._do("waking the KV cache", lambda engine: engine.wake_kv_cache())

    async def write_weights(self, message: bytes) -> Written:
        messages = await self._messages("writing weights", message)
        return await self._do(
            "writing weights", lambda engine: engine.write_weights(messages), Written
        )

    async def refit(self, message: bytes | None, version: int) -> Written:
        raise NotAvailableError("an engine of several ranks is synced step by step")

    async def reload_weights(
        self, message: bytes, first: bool, last: bool, layerwise: bool
    ) -> Written:
        messages = await self._messages("loading weights", message)
        return await self._do(
            "loading weights",
            lambda engine: engine.reload_weights(messages, first, last, layerwise),
            Written,
        )

    async def compare_weights(self, message: bytes) -> Compared:
        messages = await self._messages("comparing weights", message)
        return await self._do(
            "comparing weights", lambda engine: engine.compare_weights(messages), Compared
        )

    async def write_adapter(
        self, message: bytes, scaling: Mapping[str, float], fresh: bool
    ) -> Written:
        messages = await self._messages("writing the adapter", message)
        return await self._do(
            "writing the adapter",
            lambda engine: engine.write_adapter(messages, scaling, fresh),
            Written,
        )

    async def compare_adapter(self, message: bytes) -> Compared:
        messages = await self._messages("comparing the adapter", message)
        return await self._do(
            "comparing the adapter", lambda engine: engine.compare_adapter(messages), Compared
        )

    async def forget_weights(self, first: int) -> None:
        # Nobody waits for this one, since it is also called where a rank has failed.
        if self._engine is not None:
            await self._engine.forget_weights(first)

    async def set_weight_version(self, version: int) -> None:
        await self._do("the version", lambda engine: engine.set_weight_version(version))

    async def any_rank(self, flag: bool) -> bool:
        return any(await self._gather("whether anything was written", flag, bool))

    async def run_on_leader(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self._do(what, lambda engine: work())

    # An engine of a group isn't started anew, so `RolloutConfig.restarts` is 0.

    async def ping(self) -> None:
        if self._engine is not None:
            await self._engine.ping()

    def let_requests_wait(self, restarts: int) -> None:
        raise _not_restarted()

    def kill(self) -> None:
        if self._engine is not None:
            self._engine.kill()

    async def restart(self) -> None:
        raise _not_restarted()

    async def readmit(self) -> None:
        raise _not_restarted()

    def give_up(self, why: str) -> None:
        if self._engine is not None:
            self._engine.give_up(why)

    def close(self, timeout: float) -> None:
        """End the engine, on the first rank; the others are told at their next call."""
        with contextlib.suppress(Exception):
            self._group.fail("close()", StateError("the server is closed"))
        if self._relay is not None:
            self._relay.close()
        if self._engine is not None:
            self._engine.close(timeout)

    def _serving(self) -> Engine:
        if self._engine is None:
            raise StateError("this rank's engine is served by its group's first rank; ask that one")
        return self._engine

    async def _messages(self, what: str, message: bytes) -> dict[str, bytes]:
        """Every rank's message by the place of the worker that opens it."""
        told = await self._gather(what, _OfRank(self._place, message), _OfRank)
        return {one.place: one.message for one in told}

    async def _do(
        self, what: str, work: Callable[[Engine], Coroutine[Any, Any, T]], kind: Any = None
    ) -> T:
        """The first rank's engine does `work`; all have its result, or its error.

        kind: the result's type; None: it is None.
        """
        value: T | None = None
        if self._engine is not None:
            try:
                value = await work(self._engine)
            except BaseException as error:
                late = isinstance(error, asyncio.CancelledError)
                self._group.fail(what, DeadlineError("not done in time") if late else error)
                raise
        told: list[Any] = await self._gather(what, value, kind and kind | None)
        result: T = told[0]
        return result

    async def _gather(self, what: str, value: T, kind: Any) -> list[T]:
        # The store blocks while it waits.
        return await in_thread(self._group.gather, what, value, self._timeout, kind)


def _not_restarted() -> NotAvailableError:
    return NotAvailableError(
        "an engine that ranks share (engine_args['tensor_parallel_size']) isn't restarted; close() "
        "the server and attach() again"
    )
