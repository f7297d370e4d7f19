"""Running an agent once for each example, concurrently: what a step's rollouts are.

An agent is a function of the user's, `agent(session, example)`, sync or async. It talks to the
policy through the session with whatever client it likes, and returns a reward or sets it on the
session. One that fails, in whatever way, or takes too long costs its own rollout, not the others.
"""

import asyncio
import contextlib
import functools
import inspect
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.errors import ConfigError
from rollout_server.observability.logs import GENERAL
from rollout_server.rollouts.agent_loop import AgentLoop, AgentLoops, Task, Work, awaited
from rollout_server.trajectories.session import Session

Agent = Callable[[Session, Any], Any]
_TICK = 0.1  # seconds between two looks at the clock
_ENDING = 1.5  # seconds for what agents leave behind


@dataclass
class Outcome:
    """What came of one example: its session (ended), and the error if it failed."""

    session: Session
    error: BaseException | None
    seconds: float

    @property
    def turns(self) -> int:
        """How many calls of the policy were recorded."""
        return len(self.session.tree.calls)


def run_agents(
    open_session: Callable[..., Session],
    agent: Agent,
    examples: Sequence[Any],
    *,
    concurrency: int,
    timeout: float,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run `agent` for each of `examples`; outcomes in their order.

    open_session: makes a session; concurrency: how many run at a time; timeout: seconds for each,
    after which its session ends, so that its next call is refused; done: called after each, in this
    thread.

    Works from any thread, a notebook's included: async agents share a loop of their own, others run
    in threads. What they leave behind on the loop is ended; a thread that doesn't end is left.
    """
    outcomes: dict[int, Outcome] = {}
    ended: queue.SimpleQueue[tuple[_Rollout, Outcome]] = queue.SimpleQueue()
    waiting, running, loops = iter(enumerate(examples)), set[_Rollout](), AgentLoops()
    try:
        while True:
            for at, example in itertools.islice(waiting, concurrency - len(running)):
                rollout = _Rollout(at, open_session(example=example), agent, example, ended.put)
                running.add(rollout)
                rollout.start(loops)
            if not running:
                return [outcomes[at] for at in range(len(examples))]
            with contextlib.suppress(queue.Empty):
                rollout, outcome = ended.get(timeout=_TICK)  # so that Ctrl-C gets through
                running.remove(rollout)
                outcomes[rollout.at] = outcome
                _log(outcome)
                done(outcome)
            for rollout in running:
                if rollout.outcome is None and rollout.seconds > timeout:
                    rollout.give_up(TimeoutError(f"the agent took more than {timeout:g} s"))
            if loops.replaced():
                for rollout in running:
                    rollout.start(loops)  # which does nothing for those that had begun
    finally:
        for rollout in running:
            rollout.give_up(asyncio.CancelledError("the run of agents was ended"))
        loops.close(_ENDING)


class _Rollout:
    """One example and its agent at work, which ends once, whoever is the first to say so."""

    def __init__(
        self,
        at: int,
        session: Session,
        agent: Agent,
        example: Any,
        tell: Callable[[tuple["_Rollout", Outcome]], None],
    ):
        """tell: called with (this, its outcome) when there is one, in any thread."""
        self.at = at
        self.outcome: Outcome | None = None
        self._session = session
        self._call = functools.partial(agent, session, example)
        self._is_async = _is_async(agent)
        self._tell = tell
        self._lock = threading.Lock()
        self._began: float | None = None
        self._task: tuple[AgentLoop, Task] | None = None

    @property
    def seconds(self) -> float:
        """How long the agent has been at work."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def start(self, loops: AgentLoops) -> None:
        if self._is_async:
            self._start_on(loops.current, lambda: self._call() if self._begin() else None)
            return
        try:
            threading.Thread(
                target=self._in_thread, args=(loops,), name="rollout-agent", daemon=True
            ).start()
        except RuntimeError as error:  # there are too many
            self._end(error)

    def give_up(self, error: BaseException) -> None:
        """End it with `error`, and cancel it where that can be done."""
        self._end(error)
        if self._task is not None:
            loop, task = self._task
            loop.cancel(task)

    def _start_on(self, loop: AgentLoop, work: Callable[[], Work | None]) -> None:
        def started() -> Work | None:
            try:
                coroutine = work()
            except BaseException as error:
                self._end(error)
                return None
            return None if coroutine is None else self._until_its_end(coroutine)

        def told(task: Task) -> None:
            self._task = loop, task

        loop.start(started, told)

    def _begin(self) -> bool:
        """Whether the agent is to be called now: once, and not after the end."""
        with self._lock:
            if self._began is not None or self.outcome is not None:
                return False
            self._began = time.monotonic()
            return True

    async def _until_its_end(self, work: Work) -> None:
        try:
            reward = await work
        except BaseException as error:
            self._end(error)
        else:
            self._end(None, reward)

    def _in_thread(self, loops: AgentLoops) -> None:
        if not self._begin():
            return
        try:
            result = self._call()
        except BaseException as error:
            self._end(error)
            return
        if inspect.isawaitable(result):
            self._start_on(loops.current, lambda: awaited(result))
        else:
            self._end(None, result)

    def _end(self, error: BaseException | None, reward: Any = None) -> None:
        with self._lock:
            if self.outcome is not None:
                return
            if reward is not None:
                try:
                    self._session.set_reward(reward)
                except Exception as refused:
                    error = refused
            self.outcome = outcome = Outcome(self._session, error, self.seconds)
        self._session.end()
        self._tell((self, outcome))


def _log(outcome: Outcome) -> None:
    error = outcome.error
    if error is not None:
        GENERAL.warning(
            "a rollout failed: %s: %s",
            type(error).__name__,
            error,
            exc_info=error,
            extra={"event": "rollout_failed", "session": outcome.session.number},
        )


def _is_async(agent: Agent) -> bool:
    return inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(
        getattr(agent, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def require_agent(agent: Any) -> None:
    """`ConfigError` unless it can be called with a session and an example."""
    if not callable(agent):
        raise ConfigError(f"rollout={agent!r}: give a function of (session, example)")
    try:
        inspect.signature(agent).bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"rollout={agent!r}: it must take two arguments, (session, example); {error}"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
