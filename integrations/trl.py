"""TRL's online trainers (GRPO, RLOO; TRL 1.0 and later) with their rollouts from the engine.

TRL asks `trainer.vllm_generation` for its completions. An object of ours takes that place, so the
trainer's own code for vLLM (when to sync, importance sampling, metrics) runs as it is. Nothing here
calls a collective: ranks may generate unequally often.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback

from rollout_server.attach import refuse_second, serve
from rollout_server.config import RolloutConfig
from rollout_server.errors import DeadlineError, RolloutServerError
from rollout_server.lifecycle.state import State
from rollout_server.observability.logs import GENERAL
from rollout_server.rollouts.agents import Agent
from rollout_server.server import RolloutServer
from rollout_server.weights.policy import Policy

from .trl_agents import AgentRollouts
from .trl_checks import check, check_rollout
from .trl_generation import EngineGeneration, sampling_of


def recognises(thing: Any) -> bool:
    """Whether `thing` is a trainer of TRL, or of a class derived from one."""
    return any(c.__module__.split(".")[0] == "trl" for c in type(thing).__mro__) and hasattr(
        thing, "accelerator"
    )


def attach(trainer: Any, config: RolloutConfig, rollout: Agent | None = None) -> RolloutServer:
    """Start a server for the trainer's policy and make it the source of its completions, or of
    the rollouts of an agent."""
    refuse_second(trainer)
    check(trainer, config)
    if rollout is not None:
        check_rollout(trainer, config)
    args = trainer.args
    policy = Policy(
        model=lambda: trainer.model,  # looked up each time: FSDP rebinds it
        tokenizer=trainer.processing_class,
        owner=trainer,
        compute_dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        sampling=sampling_of(trainer),
        seed=args.seed + trainer.accelerator.process_index,
        optimizer=lambda: trainer.optimizer,  # made when training begins
        optimizer_name=getattr(args.optim, "value", args.optim),
        shards=_shards(trainer.accelerator),
    )
    server = serve(policy, config)
    _bind(trainer, server, config, rollout)
    return server


def session_reward(reward: list[float | None], **_: Any) -> list[float | None]:
    """A reward function for GRPOTrainer: what each agent returned or set on its session. None,
    where a rollout failed, is left out of its group by TRL."""
    return reward


def _shards(accelerator: Any) -> int:
    """Over how many ranks accelerate will divide the model."""
    zero = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = getattr(accelerator.state, "fsdp_plugin", None) or getattr(zero, "zero_stage", 0) == 3
    return int(accelerator.num_processes) if sharded else 1


class _SyncAtTheEnd(TrainerCallback):
    """When training has ended, the endpoint serves the trained policy."""

    def __init__(self, server: RolloutServer):
        self._server = server

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._server.state not in (State.BROKEN, State.CLOSED):
            self._server.sync_weights()


class _Work:
    """The trainer's work, outside of which the engine is awake: clients that come then would
    otherwise wait for nothing."""

    def __init__(self, trainer: Any, server: RolloutServer):
        self._trainer = trainer
        self._server = server
        self._going_on = False

    def wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the trainer's that is work: train, evaluate, predict."""

        @functools.wraps(method)
        def working(*args: Any, **kwargs: Any) -> Any:
            with self._work():
                return method(*args, **kwargs)

        return working

    @contextlib.contextmanager
    def _work(self) -> Iterator[None]:
        if self._going_on:  # an evaluation in the middle of training
            yield
            return
        self._going_on = True
        self._trainer._last_loaded_step = -1  # weights may have been set between: let TRL sync
        try:
            yield
        except BaseException as error:
            self._wake_after(error)
            raise
        finally:
            self._going_on = False
        if self._server.state is State.ASLEEP:
            self._server.wake()

    def _wake_after(self, error: BaseException) -> None:
        """Never another error in the place of `error`."""
        if self._server.state is not State.ASLEEP:
            return
        # Ranks wake together, and the others may not have failed, or be gone.
        alone = self._trainer.accelerator.num_processes == 1
        why = str(error) if alone else "other ranks may still be at work"
        if alone and not isinstance(error, DeadlineError):
            try:
                self._server.wake()
                return
            except RolloutServerError as refused:
                why = str(refused)
        GENERAL.warning(
            "the trainer failed and the engine stays asleep (%s): clients wait until wake(), "
            "evaluate() or train() is called on each rank, or until hold_timeout",
            why,
            extra={"event": "asleep_after_failure"},
        )


def _bind(
    trainer: Any, server: RolloutServer, config: RolloutConfig, rollout: Agent | None
) -> None:
    """Put an `EngineGeneration` where TRL looks for its own, until the server is closed."""
    generation, sync_at_the_end = EngineGeneration(trainer, server), _SyncAtTheEnd(server)
    generate, score = trainer._generate, trainer._generate_and_score_completions
    mode = trainer.vllm_mode

    @functools.wraps(generate)
    def generate_then_sleep(*args: Any, **kwargs: Any) -> Any:
        # Around the whole rollout: a tool loop asks for completions many times.
        if server.state is State.ASLEEP:
            trainer._last_loaded_step = -1  # has no weights now: let TRL sync
        generation.begin()
        generated = generate(*args, **kwargs)
        generation.sleep()  # not where it failed: the trainer doesn't go on
        return generated

    agents = None if rollout is None else AgentRollouts(server, config, rollout, generation)

    @functools.wraps(score)
    def score_and_compare(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if agents is not None:
            agents.examples = inputs
        batch = score(inputs, *args, **kwargs)
        generation.log_difference(batch)
        return batch

    work = _Work(trainer, server)
    own = {
        "vllm_generation": generation,
        "_generate": generate_then_sleep,
        "_generate_and_score_completions": score_and_compare,
    } | {name: work.wrapped(getattr(trainer, name)) for name in ("train", "evaluate", "predict")}

    def unbind() -> None:
        trainer.use_vllm, trainer.vllm_mode = False, mode
        for name in own:
            delattr(trainer, name)
        trainer.remove_callback(sync_at_the_end)
        if agents is not None:
            trainer.rollout_func = None

    if agents is not None:
        trainer.rollout_func = agents
    for name, value in own.items():
        setattr(trainer, name, value)
    trainer.use_vllm = True
    trainer.vllm_mode = "server"  # the branch that assumes nothing of where vLLM is
    trainer._last_loaded_step = -1
    trainer.add_callback(sync_at_the_end)
    server.call_on_close(unbind)
