"""Tensor parallel: one engine for a group of ranks, with a worker on each one's device.

The group's first rank starts the engine and serves it. Every rank has a `GroupEngine`, on which all
make the same calls in the same order; a call is done when the first rank's engine has done it, and
fails on all if on one. Of weights, each rank tells of its own memory, which the worker on the same
device opens. `generate` alone is each rank's own: the others' prompts go to the first through a
socket.
"""

import asyncio
import base64
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from rollout_server.concurrency.loop import in_thread
from rollout_server.engine.engine import LOG_LINES, Engine
from rollout_server.engine.relay import Relay, relayed
from rollout_server.errors import DeadlineError, StateError
from rollout_server.ranks import Ranks


class GroupEngine:
    """`Engine`'s methods, for a rank of a group. Made by `join`."""

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
        told = {} if engine is None else {
            "workers": engine.workers, "description": engine.description, "pid": engine.pid,
            "max_model_len": engine.max_model_len, "relay": relay.address,
        }  # fmt: skip
        told = (await self._gather("attach(): engine", told))[0]
        self.workers, self.pid = told["workers"], told["pid"]
        self.max_model_len = told["max_model_len"]
        here = self.workers[group.rank]
        memory = {name: here[name] for name in ("weight_bytes", "kv_cache_bytes")}
        self.description = told["description"] | memory
        self._address, self._place = told["relay"], place
        return self

    async def of_first(self, what: str, work: Callable[[], Coroutine]) -> Any:
        return await self._do(what, lambda engine: work())

    @property
    def client(self) -> Any:
        """vLLM's, on the first rank."""
        return self._engine.client

    @property
    def resident_bytes(self) -> int:
        """Resident host memory of the engine's processes, which are the first rank's."""
        return 0 if self._engine is None else self._engine.resident_bytes

    @property
    def running(self) -> int:
        """As `Engine`'s, on the first rank; 0 on others."""
        return 0 if self._engine is None else self._engine.running

    def log_tail(self, lines: int = LOG_LINES) -> str:
        """As `Engine`'s, on the first rank; empty on others."""
        return "" if self._engine is None else self._engine.log_tail(lines)

    def take_kv_cache_peak(self) -> float:
        """As `Engine`'s, on the first rank; 0 on others."""
        return 0.0 if self._engine is None else self._engine.take_kv_cache_peak()

    @property
    def dead(self) -> bool:
        """As `Engine`'s, on the first rank; the others are told at their next call."""
        return self._engine is not None and self._engine.dead

    @property
    def condition(self) -> str:
        return "that of another rank" if self._engine is None else self._engine.condition

    def require_alive(self) -> None:
        """As `Engine`'s, on the first rank; the others are told at their next call."""
        if self._engine is not None:
            self._engine.require_alive()

    def give_up(self, why: str) -> None:
        """Requests fail; an engine of a group isn't started anew."""
        if self._engine is not None:
            self._engine.give_up(why)

    async def generate(
        self, prompt: list[int], fields: Mapping[str, Any], request_id: str
    ) -> list[Any]:
        if self._engine is not None:
            return await self._engine.generate(prompt, fields, request_id)
        request_id = f"rank{self._group.rank}-{request_id}"
        return await relayed(self._address, (prompt, dict(fields), request_id))

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

    async def set_weight_version(self, version: int) -> None:
        await self._do("the version", lambda engine: engine.set_weight_version(version))

    async def write_weights(self, message: bytes) -> dict[str, Any]:
        return await self._weights("writing weights", message, Engine.write_weights)

    async def reload_weights(
        self, message: bytes, first: bool, last: bool, layerwise: bool
    ) -> dict[str, Any]:
        return await self._weights(
            "loading weights", message, Engine.reload_weights, first, last, layerwise
        )

    async def compare_weights(self, message: bytes) -> list[str]:
        return await self._weights("comparing weights", message, Engine.compare_weights)

    async def write_adapter(
        self, message: bytes, scaling: Mapping[str, float], fresh: bool
    ) -> dict[str, Any]:
        return await self._weights(
            "writing the adapter", message, Engine.write_adapter, scaling, fresh
        )

    async def compare_adapter(self, message: bytes) -> list[str]:
        return await self._weights("comparing the adapter", message, Engine.compare_adapter)

    async def forget_weights(self, first: int) -> None:
        # Nobody waits for this one, since it is also called where a rank has failed.
        if self._engine is not None:
            await self._engine.forget_weights(first)

    async def anywhere(self, flag: bool) -> bool:
        return any(await self._gather("whether anything was written", flag))

    async def _weights(
        self, what: str, message: bytes, method: Callable[..., Coroutine], *args: Any
    ) -> Any:
        told = await self._gather(what, [self._place, base64.b64encode(message).decode()])
        messages = {place: base64.b64decode(text) for place, text in told}
        return await self._do(what, lambda engine: method(engine, messages, *args))

    async def _do(self, what: str, work: Callable[[Engine], Coroutine]) -> Any:
        """The first rank's engine does `work`; all have its result, or its error."""
        value = None
        if self._engine is not None:
            try:
                value = await work(self._engine)
            except BaseException as error:
                late = isinstance(error, asyncio.CancelledError)
                self._group.fail(what, DeadlineError("not done in time") if late else error)
                raise
        return (await self._gather(what, value))[0]

    async def _gather(self, what: str, value: Any) -> list[Any]:
        # The store blocks while it waits.
        return await in_thread(self._group.gather, what, value, self._timeout)

    def close(self, timeout: float) -> None:
        """End the engine, on the first rank; the others are told at their next call."""
        with contextlib.suppress(Exception):
            self._group.fail("close()", StateError("the server is closed"))
        if self._engine is not None:
            self._relay.close()
            self._engine.close(timeout)


async def of_first(engine: Engine | GroupEngine, what: str, work: Callable[[], Coroutine]) -> Any:
    """`work` of the rank that serves, for which the others of its group wait."""
    return await (engine.of_first(what, work) if isinstance(engine, GroupEngine) else work())
