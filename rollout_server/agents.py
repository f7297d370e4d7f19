"""Running an agent once for each example, concurrently: what a step's rollouts are.

An agent is a function of the user's, `agent(session, example)`, sync or async. It talks to the
policy through the session with whatever client it likes, and returns a reward or sets it on the
session. One that raises or takes too long costs its own rollout, not the others.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.engine.loop import in_thread
from rollout_server.errors import ConfigError
from rollout_server.logs import GENERAL
from rollout_server.trajectories.session import Session

Agent = Callable[[Session, Any], Any]


@dataclass
class Outcome:
    """What came of one example: its session (ended), and the error if it failed."""

    session: Session
    error: BaseException | None
    seconds: float

    @property
    def turns(self) -> int:
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
    after which its session ends, so that its next call is refused; done: called after each.

    Works from any thread, a notebook's included: agents run on a loop of their own, or in threads.
    """
    results: list[Outcome | None] = [None] * len(examples)
    failure: list[BaseException] = []

    async def one(at: int, turn: asyncio.Semaphore) -> None:
        async with turn:
            results[at] = outcome = await _one(open_session, agent, examples[at], timeout)
            done(outcome)

    async def everything() -> None:
        turn = asyncio.Semaphore(concurrency)
        async with asyncio.TaskGroup() as group:
            for at in range(len(examples)):
                group.create_task(one(at, turn))

    loop = asyncio.new_event_loop()
    work = loop.create_task(everything())

    def main() -> None:
        try:
            loop.run_until_complete(work)
        except BaseException as error:
            failure.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=main, name="rollout-agents", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # so that Ctrl-C gets through
    except BaseException:
        loop.call_soon_threadsafe(work.cancel)
        thread.join(5)
        raise
    if failure:
        raise failure[0]
    return results


async def _one(
    open_session: Callable[..., Session], agent: Agent, example: Any, timeout: float
) -> Outcome:
    started, error = time.monotonic(), None
    session = open_session(example=example)
    try:
        async with asyncio.timeout(timeout):
            reward = await _called(agent, session, example)
        if reward is not None:
            session.set_reward(reward)
    except TimeoutError as late:
        error = late if str(late) else TimeoutError(f"the agent took more than {timeout:g} s")
    except Exception as raised:
        error = raised
    finally:
        session.end()
    if error is not None:
        GENERAL.warning(
            "a rollout failed: %s: %s", type(error).__name__, error, exc_info=error,
            extra={"event": "rollout_failed", "session": session.number},
        )  # fmt: skip
    return Outcome(session, error, time.monotonic() - started)


async def _called(agent: Agent, session: Session, example: Any) -> Any:
    if inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(
        getattr(agent, "__call__", None)  # noqa: B004 - an object with an async __call__
    ):
        return await agent(session, example)
    # A thread can't be stopped: one that is given up finds its session ended.
    result = await in_thread(agent, session, example)
    return await result if inspect.isawaitable(result) else result


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
