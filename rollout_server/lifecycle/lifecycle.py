"""The server's transitions: who may run when, and in which order things happen.

Order of a step, each line the cure of a known failure:

1. close the gate: new requests are held;
2. bring running requests to rest (vLLM freezes or finishes them) and forget all caches;
3. sleep;
4. (the trainer trains)
5. wake the weights, write the trainer's, compare; only then the KV cache: an engine that is
   half awake must not run a forward pass;
6. raise the policy version, resume, open the gate.

One transition at a time. A step isn't cancelled by its caller going away. A new engine in the place
of one that died takes its weights, as in 5, and its requests (see steps.py).
"""

import contextlib
from collections.abc import AsyncIterator

from rollout_server.errors import EngineDeadError, EngineTimeoutError, StateError
from rollout_server.lifecycle.state import State
from rollout_server.lifecycle.steps import Steps, shielded
from rollout_server.lifecycle.sync_transition import SyncTransition


class Lifecycle:
    """Begins the transitions, on the server's loop."""

    def __init__(self, steps: Steps):
        self.steps = steps

    @property
    def version(self) -> int:
        """The policy's."""
        return self.steps.version

    @property
    def down(self) -> bool:
        """Whether the engine has died and the next transition to "awake" starts another."""
        return self.steps.down

    @property
    def unfinished(self) -> bool:
        """Whether a sync was interrupted with weights half written: the next one writes all."""
        return self.steps.unfinished

    async def lose(self, why: str, hung: bool = False) -> None:
        """The engine was seen to be dead, or `hung`, while it should be awake."""
        steps = self.steps
        async with steps.transition_lock:
            if steps.box.state is State.AWAKE and (hung or steps.engine.dead):
                error = (EngineTimeoutError if hung else EngineDeadError)(why)
                steps.lose_or_break("awake", error)

    async def give_up(self, why: str) -> None:
        """The engine that is down won't be restarted."""
        async with self.steps.transition_lock:
            if self.down:
                self.steps.break_(why)

    async def sleep(self) -> None:
        """awake -> asleep; nothing to do if asleep already."""
        await shielded(self._sleep)

    async def _sleep(self) -> None:
        steps = self.steps
        async with steps.transition_lock:
            steps.box.require_open()
            if steps.box.state is State.ASLEEP:
                return
            with steps.journal.sleeping():
                with steps.unless_down():
                    if (left := steps.take_unfinished()) is not None:
                        await steps.leave(left)
                    elif not self.down:
                        await steps.quiesce()
                        await steps.fall_asleep()
                if self.down:  # its memory is free; it is started anew when it is to wake
                    steps.box.move(State.ASLEEP)

    def sync(self, restoring: bool = False) -> SyncTransition:
        """A weight sync, which `SyncTransition.begin` begins; it must be ended then. Any thread's.

        restoring: only if the engine is down or its weights are half written; `StateError` from
        `begin` otherwise.
        """
        return SyncTransition(self.steps, restoring)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """While the engine's weights are read, requests run and no transition does."""
        steps = self.steps
        async with steps.transition_lock:
            steps.box.require_open()
            if steps.box.state is not State.AWAKE:
                raise StateError(
                    f"the server is {steps.box.state}, its weights can't be compared; wake() it "
                    "first"
                )
            async with steps.deadline(steps.config.sync_timeout, "comparing weights"):
                yield
