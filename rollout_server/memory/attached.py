"""The plan of a policy and its trainer as they are at `attach`, and room before each wake."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rollout_server.config import RolloutConfig
from rollout_server.errors import OutOfMemoryError, RolloutServerError
from rollout_server.memory.engine import Batch, activation_bytes, graph_bytes
from rollout_server.memory.kv_cache import kv_cache_of
from rollout_server.memory.model import engine_bytes, largest_block
from rollout_server.memory.optimizers import (
    Optimizer,
    here,
    of_object,
    of_trainers_name,
    tensors_of,
    trained,
)
from rollout_server.memory.plan import Demand, plan
from rollout_server.memory.sizes import shown
from rollout_server.offload import bare_optimizer
from rollout_server.progress import Progress
from rollout_server.weights.exports import give_back
from rollout_server.weights.policy import Policy
from rollout_server.weights.shared import require_shareable
from rollout_server.weights.sources.base import Source

USUAL_LENGTH = 2048  # tokens of a request that must fit where `max_model_len` isn't given


def planned(
    policy: Policy, config: RolloutConfig, source: Source, progress: Progress
) -> RolloutConfig:
    """The options, with the size of the KV cache if it wasn't given. Without a GPU, or with a share
    of it for the engine, as they are.

    Raises `OutOfMemoryError` with the table if it can't fit.
    """
    if policy.gpu is None or (config.gpu_memory_utilization and config.colocate != "share"):
        return config  # vLLM measures for itself
    give_back()
    free, total = torch.cuda.mem_get_info(policy.gpu)
    try:
        demand, certain = demand_of(policy, config, source, free, total)
        made = plan(demand)
        if not (certain or made.fits):  # what is only assumed is no reason to refuse
            made = plan(dataclasses.replace(demand, gradients=0, optimizer=0, casts=0))
    except (RolloutServerError, AttributeError) as error:
        progress.say(f"memory isn't planned: {error}")
        return config
    progress.say(f"memory of GPU {policy.gpu}, planned:\n{made.table()}\n{made.verdict()}")
    if not made.fits:
        raise OutOfMemoryError(f"{made.verdict()}\n{made.table()}")
    return dataclasses.replace(config, kv_cache_memory_bytes=made.kv_bytes)


def demand_of(
    policy: Policy, config: RolloutConfig, source: Source, free: int, total: int
) -> tuple[Demand, bool]:
    """What is needed of a GPU of `total` bytes, of which `free` are; and whether the optimizer is
    known, or only assumed."""
    model, arguments = policy.model(), config.engine_args
    parameters = list(model.parameters())
    optimizer = _optimizer(policy, parameters)
    ranks = 1 if source.collective else policy.shards  # it may be sharded already
    dtype = policy.dtype if config.dtype == "auto" else config.dtype
    element = getattr(torch, dtype).itemsize
    kept = 1 if str(arguments.get("kv_cache_dtype", "auto")).startswith("fp8") else element
    architecture: Any = policy.bare.config
    text = architecture.get_text_config(decoder=True)
    batch = Batch.of(total, arguments)
    weights = _bytes(parameters) // ranks
    gradients = _bytes(trained(parameters)) // ranks
    state = optimizer.state_bytes() // ranks
    # What is there already isn't needed again.
    there = _on_gpu([*parameters, *_gradients(parameters), *_state(policy)])
    others = max(0, total - free - there)
    shapes = {name: spec.shape for name, spec in source.specs.items() if not spec.is_buffer}
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    length = config.max_model_len or min(USUAL_LENGTH, _length(text))
    staged = source.collective or source.staged_from is not None
    tensor_parallel = config.tensor_parallel
    demand = Demand(
        total=total,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        casts=_casts(parameters, element) if policy.compute_dtype else 0,
        gathered=2 * largest_block(model, source.collective or ranks > 1),
        others=others,
        engine_weights=engine_bytes(shapes, element, tensor_parallel, heads),
        adapter=source.adapter.bytes if source.adapter is not None else 0,
        activations=activation_bytes(architecture, batch, element, tensor_parallel),
        graphs=graph_bytes(architecture, batch, bool(arguments.get("enforce_eager"))),
        kv_cache=kv_cache_of(architecture, kept, tensor_parallel, batch.tokens),
        kv_bytes=config.kv_cache_memory_bytes,
        utilization=config.gpu_memory_utilization,
        longest=length,
        at_most=batch.requests * -(-_length(text) // length),
        bucket=config.sync_bucket_bytes if staged or ranks > 1 else 0,
        colocate=config.colocate,
        offload=config.offload_optimizer,
        shareable=tensor_parallel == 1 and ranks == 1 and _shareable(source, element),
        movable=policy.optimizer is not None,
    )
    return demand, optimizer.known


def require_room(needed: int, device: int | None, gradients: int) -> None:
    """Before a wake: `OutOfMemoryError` unless `needed` bytes are free on the GPU `device`.

    gradients: bytes of those that the policy still holds.
    """
    if device is None:
        return
    give_back()
    free, _ = torch.cuda.mem_get_info(device)
    if free >= needed:
        return
    held = (
        f"the policy's gradients hold {shown(gradients)} (optimizer.zero_grad() frees them)"
        if gradients
        else "delete tensors of the last step, or use offload_optimizer=True or a smaller "
        "kv_cache_memory_bytes"
    )
    raise OutOfMemoryError(
        f"waking the engine needs {shown(needed)} of GPU {device}, and {shown(free)} are free: "
        f"{held}. The server sleeps as before"
    )


def gradient_bytes(model: Any) -> int:
    """Of the gradients that a model's parameters hold on a GPU now."""
    return _on_gpu(_gradients(model.parameters()))


def _optimizer(policy: Policy, parameters: list[Any]) -> Optimizer:
    live = None if policy.optimizer is None else bare_optimizer(policy.optimizer())
    if live is not None:
        return of_object(live)
    found = of_trainers_name(policy.optimizer_name, parameters)
    known = found.known and policy.optimizer_name is not None
    return Optimizer(found.kind, found.groups, known)


def _state(policy: Policy) -> Iterator[torch.Tensor]:
    live = None if policy.optimizer is None else bare_optimizer(policy.optimizer())
    yield from tensors_of({} if live is None else live.state)


def _gradients(parameters: Iterable[Any]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _bytes(parameters: Iterable[Any]) -> int:
    return sum({id(p): here(p).nbytes for p in parameters}.values())


def _on_gpu(tensors: Iterable[Any]) -> int:
    local = {id(t): here(t) for t in tensors}
    return sum(t.nbytes for t in local.values() if t.device.type == "cuda")


def _casts(parameters: Iterable[Any], element: int) -> int:
    """Autocast's copies of parameters that are in another dtype, for as long as the graph lives."""
    return sum(here(p).numel() * element for p in parameters if p.element_size() > element)


def _shareable(source: Source, element: int) -> bool:
    try:
        require_shareable(source)
    except RolloutServerError:
        return False
    return all(
        spec.dtype.itemsize == element for spec in source.specs.values() if not spec.is_buffer
    )


def _length(text: Any) -> int:
    return getattr(text, "max_position_embeddings", None) or USUAL_LENGTH
