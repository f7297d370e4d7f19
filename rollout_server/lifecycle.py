"""The server's transitions: who may run when, and in which order things happen.

Order of a step, each line the cure of a known failure:

1. close the gate: new requests are held;
2. bring running requests to rest (vLLM freezes or finishes them) and forget all caches;
3. sleep;
4. (the trainer trains)
5. wake the weights, load the trainer's, compare; only then the KV cache: an engine that is
   half awake must not run a forward pass;
6. raise the policy version, open the gate.

One transition at a time. A transition isn't cancelled by its caller going away; what fails after
the gate was closed and can't be undone marks the server broken and tells every held request.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from rollout_server.config import RolloutConfig
from rollout_server.engine.engine import Engine
from rollout_server.errors import DeadlineError, StateError
from rollout_server.http.gate import Gate
from rollout_server.state import State, StateBox


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    Attributes:
        version: policy version from now on.
        bytes: size of the trainer's tensors.
        seconds: from the call until requests flowed again.
        wake_seconds: of these, those that waking took; 0 if the engine was awake.
        path: how the weights went: "load_weights" is vLLM's loader, tensor by tensor.
        tensors: number of tensors.
        verified: whether what the engine holds was compared with what was sent.
    """

    version: int
    bytes: int
    seconds: float
    wake_seconds: float
    path: str
    tensors: int
    verified: bool


class Lifecycle:
    """Runs on the server's loop. Owns the transitions and the policy version."""

    def __init__(self, config: RolloutConfig, engine: Engine, box: StateBox, gate: Gate):
        self._config = config
        self._engine = engine
        self._box = box
        self._gate = gate
        self._turn = asyncio.Lock()
        self._syncs = 0
        self.version = -1  # the first sync, at attach, makes it 0

    async def sleep(self) -> None:
        """awake -> asleep; nothing to do if asleep already."""
        await self._transition(self._sleep)

    async def sync(self, message: bytes) -> SyncReport:
        """Give the engine the weights of `message`, waking it if it sleeps."""
        return await self._transition(self._sync, message)

    async def verify(self, message: bytes) -> None:
        """Compare the engine's weights with those of `message`."""
        await self._transition(self._verify, message)

    async def _transition(self, work: Callable[..., Coroutine], *args: Any) -> Any:
        async def one_at_a_time():
            async with self._turn:
                self._box.require_open()
                return await work(*args)

        # The caller's cancellation (its deadline, Ctrl-C) doesn't stop a transition half-way.
        return await asyncio.shield(asyncio.ensure_future(one_at_a_time()))

    async def _sleep(self) -> None:
        if self._box.state is State.ASLEEP:
            return
        await self._rest()
        with self._breaking("falling asleep"):
            async with _deadline(self._config.sleep_timeout, "falling asleep"):
                await self._engine.sleep()
            self._box.move(State.ASLEEP)

    async def _sync(self, message: bytes) -> SyncReport:
        started, waking = time.perf_counter(), 0.0
        asleep = self._box.state is State.ASLEEP
        if asleep:
            self._box.move(State.WAKING)
        elif self._box.state is State.AWAKE:
            await self._rest()
        with self._breaking("syncing weights"):
            if asleep:
                waking -= time.perf_counter()
                async with _deadline(self._config.wake_timeout, "waking the weights"):
                    await self._engine.wake_weights()
                waking += time.perf_counter()
            self._box.move(State.SYNCING)
            verify = self._due()
            async with _deadline(self._config.sync_timeout, "syncing weights"):
                report = await self._engine.load_weights(message, verify)
                # Before scheduling resumes, so that each token is counted to its version.
                await self._engine.set_weight_version(self.version + 1)
            async with _deadline(self._config.wake_timeout, "waking the KV cache"):
                if asleep:
                    waking -= time.perf_counter()
                    await self._engine.wake_kv_cache()
                    waking += time.perf_counter()
                else:
                    await self._engine.resume()
            self._syncs += 1
            self.version += 1
            self._box.move(State.AWAKE)
        self._gate.open()
        return SyncReport(
            version=self.version,
            bytes=report["bytes"],
            seconds=time.perf_counter() - started,
            wake_seconds=waking,
            path="load_weights",
            tensors=report["tensors"],
            verified=verify,
        )

    async def _verify(self, message: bytes) -> None:
        if self._box.state is not State.AWAKE:
            raise StateError(
                f"the server is {self._box.state}, its weights can't be compared; wake() it first"
            )
        async with _deadline(self._config.sync_timeout, "comparing weights"):
            await self._engine.verify_weights(message)

    def _due(self) -> bool:
        every = self._config.verify_every
        return self._syncs == 0 or (every > 0 and self._syncs % every == 0)

    async def _rest(self) -> None:
        """Close the gate and bring the engine to rest. A drain that takes too long is undone."""
        self._box.move(State.CLOSING_GATE)
        self._gate.close()
        if self._config.in_flight == "drain":
            try:
                async with _deadline(self._config.drain_timeout, "letting running requests finish"):
                    await self._engine.drain()
            except DeadlineError:
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
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self._break(f"{doing}: {first}")
            raise

    def _break(self, why: str) -> None:
        self._box.break_(why)
        self._gate.shut(f"the engine is broken: {why}")


@contextlib.asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineError(f"{what}: not done after {seconds:g} s") from None
