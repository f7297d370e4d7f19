"""Looks after the engine while it should be awake, and after syncs that were interrupted; asleep,
and in transitions, others notice."""

import asyncio
import logging
from collections.abc import Callable

from rollout_server.concurrency.loop import in_thread
from rollout_server.concurrency.patience import patient
from rollout_server.config import RolloutConfig
from rollout_server.engine.protocol import EngineProtocol
from rollout_server.errors import EngineDeadError, first_line
from rollout_server.lifecycle.lifecycle import Lifecycle
from rollout_server.lifecycle.state import State, StateBox

logger = logging.getLogger("rollout_server")
_PERIOD = 0.5  # seconds


async def watch(
    config: RolloutConfig,
    engine: EngineProtocol,
    lifecycle: Lifecycle,
    box: StateBox,
    restore: Callable[[], None],
) -> None:
    """Until the server is closed: notice that the engine has died or hangs, and have it replaced;
    have a sync done again that was interrupted with weights half written.

    restore: does so, if the policy can be read now; it blocks.
    """
    while box.state is not State.CLOSED:
        await asyncio.sleep(_PERIOD)
        if box.state is State.AWAKE and config.restarts:
            await _look(config, engine, lifecycle)
        if box.state is State.DOWN or lifecycle.unfinished:
            try:
                await in_thread(restore)
            except Exception as error:
                logger.warning("the engine couldn't be restored: %s", first_line(error))
                await lifecycle.give_up(f"the engine died, and: {first_line(error)}")


async def _look(config: RolloutConfig, engine: EngineProtocol, lifecycle: Lifecycle) -> None:
    try:
        async with patient(config.liveness_timeout):
            await engine.ping()
    except EngineDeadError as error:
        await lifecycle.lose(first_line(error))
    except TimeoutError:
        limit = config.liveness_timeout
        why = f"it hasn't answered for {limit:g} s; its {engine.condition}"
        await lifecycle.lose(why, hung=True)
    except Exception as error:  # of a call that was under way when the engine was replaced
        logger.debug("a ping failed: %s", error)
