"""How a server's engine comes to be: one for this rank, or one for its group."""

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from rollout_server.config import RolloutConfig
from rollout_server.engine.arguments import engine_arguments, engine_variables
from rollout_server.engine.engine import Engine
from rollout_server.engine.folder import write_model_folder
from rollout_server.engine.gpu_memory import Need, overhead
from rollout_server.engine.group import GroupEngine
from rollout_server.engine.lora import adapter_arguments, use_adapter
from rollout_server.engine.protocol import EngineProtocol
from rollout_server.engine.temporary import TemporaryFolder
from rollout_server.ranks import Ranks
from rollout_server.weights.conversion import views_of
from rollout_server.weights.manifest import write_specs, write_views
from rollout_server.weights.policy import Policy
from rollout_server.weights.sources.base import Source
from rollout_server.weights.transport import place


async def start_engine(
    policy: Policy,
    config: RolloutConfig,
    source: Source,
    temporary: TemporaryFolder,
    names: list[str],
    sampling: dict[str, Any],
    devices: list[str | None],
    pids: list[int],
    group: Ranks,
    on_end: Callable[[], None],
) -> EngineProtocol:
    """This rank's own engine, or its `group`'s, of which all ranks call this.

    source: the policy's tensors, of which names and shapes are looked at; temporary: the server's
    folder; names: to serve under; sampling: defaults of the fields that a request leaves out;
    devices: `device_name` of each worker's; pids: takes the ids of the engine's processes;
    on_end: called when these have ended, each time.
    """
    from vllm.platforms import current_platform

    if group.rank > 0:
        return await _join(None, policy, config, group)
    dtype = policy.dtype if config.dtype == "auto" else config.dtype
    untied = "lm_head.weight" in source.specs
    folder = temporary.path
    model = temporary.model(
        lambda path: write_model_folder(path, policy.bare, policy.tokenizer, dtype, untied)
    )
    write_specs(folder, source.specs)
    write_views(folder, views_of(policy.bare, source.specs))
    on_cpu = current_platform.is_cpu()
    need = Need(
        sum(math.prod(s.shape) * s.dtype.itemsize for s in source.specs.values()),
        overhead(policy.bare.config, getattr(torch, dtype).itemsize, config.engine_args),
    )
    arguments = engine_arguments(
        config, model, folder, names, dtype, sampling, policy.seed, on_cpu, policy.gpu, need
    )
    if source.adapter is not None:
        arguments = adapter_arguments(source.adapter) | arguments
    eager = bool(arguments.get("enforce_eager"))
    variables = engine_variables(on_cpu, eager, devices, folder)
    log = os.path.join(folder, "engine.log")
    engine = await Engine.start(arguments, variables, log, pids, on_end)
    if source.adapter is not None:
        use_adapter(engine.client, config.served_model_name)
    return engine if group.size == 1 else await _join(engine, policy, config, group)


async def _join(
    engine: Engine | None, policy: Policy, config: RolloutConfig, group: Ranks
) -> GroupEngine:
    """All ranks of a group at once, the first with the engine that it has started."""
    device = torch.device("cpu" if policy.gpu is None else f"cuda:{policy.gpu}")
    timeout = max(config.start_timeout, config.transition_time)
    return await GroupEngine.join(engine, group, place(device, group.rank), timeout)
