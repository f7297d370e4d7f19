"""`attach`: the two lines."""

import importlib
import weakref
from typing import Any

from rollout_server.config import RolloutConfig
from rollout_server.errors import AlreadyAttachedError, ConfigError
from rollout_server.lifecycle.state import State
from rollout_server.rollouts.agents import Agent, require_agent
from rollout_server.server import RolloutServer
from rollout_server.weights.policy import Policy

# Modules that know a trainer. Each has `recognises(object) -> bool` and
# `attach(trainer, config, rollout) -> RolloutServer`; imported only when attach() gets one object.
TRAINERS = ("rollout_server.integrations.trl",)

# Weakly both: a server holds its owner, which would never be freed if this held the server.
_servers: "weakref.WeakKeyDictionary[Any, weakref.ref[RolloutServer]]" = weakref.WeakKeyDictionary()


def attach(
    trainer_or_model: Any,
    tokenizer: Any = None,
    /,
    *,
    optimizer: Any = None,
    rollout: Agent | None = None,
    **options: Any,
) -> RolloutServer:
    """Start a vLLM engine beside a trainer or a model, serve it, and return its handle.

    `attach(trainer, **options)` takes a TRL trainer (GRPO, RLOO); its rollouts come from the engine
    from now on. `attach(model, tokenizer, **options)` takes any model of which vLLM knows the
    architecture; call `sync_weights`, `sleep` and `wake` on the handle yourself.

    Args:
        trainer_or_model: the trainer, or the model (a `torch.nn.Module`).
        tokenizer: of the model; a trainer knows its own.
        optimizer: of the model, for `offload_optimizer=True`; a trainer knows its own.
        rollout: an agent, `rollout(session, example)`, sync or async, which is run for each prompt
            of a trainer instead of one completion: it talks to the policy through the session with
            any client, and returns a reward or sets it. `example` is the row of the data set.
        **options: fields of `RolloutConfig`.

    Returns:
        The server, once its endpoint answers.

    Raises:
        RolloutServerError: by one of its subclasses; nothing is left running then.
    """
    config = RolloutConfig.of(options)
    if rollout is not None:
        require_agent(rollout)
    if tokenizer is not None:
        if rollout is not None:
            raise ConfigError(
                "rollout= needs a trainer that asks for rollouts; with attach(model, tokenizer) "
                "use server.session(), or rollout_server.rollouts.agents.run_agents"
            )
        policy = Policy(
            model=lambda: trainer_or_model,
            tokenizer=tokenizer,
            owner=trainer_or_model,
            optimizer=None if optimizer is None else lambda: optimizer,
        )
        return serve(policy, config)
    for name in TRAINERS:
        adapter = importlib.import_module(name)
        if adapter.recognises(trainer_or_model):
            server: RolloutServer = adapter.attach(trainer_or_model, config, rollout)
            return server
    raise ConfigError(
        f"attach() was given a {type(trainer_or_model).__name__} alone; give a TRL GRPOTrainer or "
        "RLOOTrainer, or a model and its tokenizer"
    )


def serve(policy: Policy, config: RolloutConfig) -> RolloutServer:
    """A server for `policy`; `AlreadyAttachedError` if its owner has one that isn't closed."""
    refuse_second(policy.owner)
    if config.offload_optimizer and policy.optimizer is None:
        raise ConfigError(
            "offload_optimizer=True: no optimizer is known; give attach(model, tokenizer, "
            "optimizer=...)"
        )
    server = RolloutServer(policy, config)
    _servers[policy.owner] = weakref.ref(server)
    return server


def refuse_second(owner: Any) -> None:
    """Raise `AlreadyAttachedError` if `owner` has a server that isn't closed."""
    known = _servers.get(owner)
    present = None if known is None else known()
    if present is not None and present.state is not State.CLOSED:
        raise AlreadyAttachedError(
            f"this {type(owner).__name__} already has a server at {present.base_url}; use that "
            "one, or close() it first"
        )
