"""`python -m rollout_server.doctor memory`: whether a model and its trainer fit on a GPU.

Reckoned from the model's config, without a GPU and without weights. Ends with 0 if it fits, with 1
if it doesn't, and with 2 for an option that can't be used.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rollout_server.config import COLOCATE, RolloutConfig
from rollout_server.errors import ConfigError, RolloutServerError
from rollout_server.memory.sizes import shown, size_of

_PRECISIONS = ("bf16-amp", "fp16-amp", "bf16", "fp16", "fp32")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    given = _parser().parse_args(arguments)
    try:
        made, heading = _plan(given)
    except RolloutServerError as error:
        print(f"python -m rollout_server.doctor memory: {error}", file=sys.stderr)
        return 2
    print(f"{heading}\n\n{made.table()}\n\n{made.verdict()}")
    return 0 if made.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rollout_server.doctor memory",
        description="Whether a model, its trainer and its engine fit on one GPU.",
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder with a config.json, that file, or a hub's name")
    add("--gpu", required=True, help="the GPU's memory, as 80GiB")
    add(
        "--trainer",
        required=True,
        help="[lora-]OPTIMIZER-PRECISION: adamw-bf16, adamw-fp32, adamw-bf16-amp (weights in fp32, "
        "computed with in bf16), sgd-bf16, adafactor-bf16, adamw8bit-bf16, lora-adamw-bf16, ...",
    )
    add("--lora-rank", type=int, default=16, help="with a lora trainer (default 16)")
    add("--ranks", type=int, default=1, help="over how many GPUs FSDP divides the trainer")
    add("--colocate", default="sleep", help="as the option of attach()")
    add("--offload-optimizer", action="store_true", help="as the option of attach()")
    add("--dtype", default="auto", help="of the engine; what the trainer computes in by default")
    add("--tensor-parallel", type=int, default=1, help="GPUs for one engine")
    add("--max-model-len", type=int, help="tokens of the longest request (default 2048)")
    add("--kv-cache", help="its size, as 8GiB; what is left by default")
    add("--gpu-memory-utilization", type=float, help="share of the GPU for the engine")
    add("--sync-bucket", default="512MiB", help="as sync_bucket_bytes (default 512MiB)")
    add("--enforce-eager", action="store_true", help="the engine without CUDA graphs")
    return parser


def _plan(given: argparse.Namespace) -> tuple[Any, str]:
    import torch

    from rollout_server.memory.attached import USUAL_LENGTH
    from rollout_server.memory.engine import CONTEXT, Batch, activation_bytes, graph_bytes
    from rollout_server.memory.kv_cache import kv_cache_of
    from rollout_server.memory.model import (
        engine_bytes,
        largest_block,
        lora_shapes,
        parameter_shapes,
        read_config,
        without_weights,
    )
    from rollout_server.memory.optimizers import by_name
    from rollout_server.memory.plan import Demand, plan

    lora, optimizer, precision = _trainer(given.trainer)
    for name in ("lora_rank", "ranks", "tensor_parallel"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(given, name)}: give at least 1")
    if given.dtype not in ("auto", *_DTYPES.values()):
        raise ConfigError(f"--dtype={given.dtype!r}: give auto, {', '.join(_DTYPES.values())}")
    if given.colocate not in COLOCATE:
        raise ConfigError(f"--colocate={given.colocate!r}: give one of {', '.join(COLOCATE)}")
    # The same checks as attach() makes.
    options = RolloutConfig(
        colocate=given.colocate,
        offload_optimizer=given.offload_optimizer,
        max_model_len=given.max_model_len,
        kv_cache_memory_bytes=given.kv_cache and size_of("--kv-cache", given.kv_cache),
        gpu_memory_utilization=given.gpu_memory_utilization,
        sync_bucket_bytes=size_of("--sync-bucket", given.sync_bucket),
        engine_args={"tensor_parallel_size": given.tensor_parallel},
    )
    total, ranks, tensor_parallel = size_of("--gpu", given.gpu), given.ranks, given.tensor_parallel
    config = read_config(given.model)
    text = config.get_text_config(decoder=True)
    amp = precision.endswith("-amp")
    stored = torch.float32 if amp else getattr(torch, _DTYPES[precision])
    computed = getattr(torch, _DTYPES[precision.removesuffix("-amp")])
    engine = computed if given.dtype == "auto" else getattr(torch, given.dtype)
    model = without_weights(config, stored)
    parameters = list(model.parameters())
    trained: list[torch.Tensor] = list(parameters)
    adapter = 0
    if lora:
        # PEFT keeps adapters of half precision in float32.
        trained = [
            torch.nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))
            for shape in lora_shapes(model, given.lora_rank)
        ]
        adapter = sum(p.nbytes for p in trained)
    shapes = parameter_shapes(model)
    batch = Batch.of(total, {})
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    longest = given.max_model_len or USUAL_LENGTH
    limit = getattr(text, "max_position_embeddings", None) or longest
    made = plan(
        Demand(
            total=total,
            weights=(sum(p.nbytes for p in parameters) + adapter) // ranks,
            gradients=sum(p.nbytes for p in trained) // ranks,
            optimizer=by_name(optimizer, trained).state_bytes() // ranks,
            casts=sum(p.numel() for p in parameters) * computed.itemsize if amp else 0,
            gathered=2 * largest_block(model, ranks > 1),
            others=CONTEXT,
            engine_weights=engine_bytes(shapes, engine.itemsize, tensor_parallel, heads),
            adapter=0,
            activations=activation_bytes(config, batch, engine.itemsize, tensor_parallel),
            graphs=graph_bytes(config, batch, given.enforce_eager),
            kv_cache=kv_cache_of(config, engine.itemsize, tensor_parallel, batch.tokens),
            kv_bytes=options.kv_cache_memory_bytes,
            utilization=options.gpu_memory_utilization,
            longest=longest,
            at_most=batch.requests * -(-limit // longest),
            bucket=options.sync_bucket_bytes if ranks > 1 or lora else 0,
            colocate=options.colocate,
            offload=options.offload_optimizer,
            shareable=stored == engine and ranks == tensor_parallel == 1 and not lora,
            movable=True,
        )
    )
    if options.colocate == "share" and not made.demand.shareable:
        raise ConfigError(
            f"--colocate='share' with --trainer={given.trainer!r}, --ranks={ranks}: one memory for "
            "both needs the engine's dtype to be the trainer's, one rank and no merged adapter; "
            "use --colocate=sleep"
        )
    number = sum(p.numel() for p in parameters)
    heading = (
        f"{config.model_type}, {number / 1e9:.2f} billion parameters; trainer {given.trainer}"
        f"{f' over {ranks} GPUs' if ranks > 1 else ''}; engine {str(engine).removeprefix('torch.')}"
        f"; KV cache {shown(made.demand.kv_cache.token_bytes)} a token"
    )
    return made, heading


def _trainer(name: str) -> tuple[bool, str, str]:
    """Whether it is LoRA, the optimizer, the precision."""
    from rollout_server.memory.optimizers import NAMES

    rest = name.removeprefix("lora-")
    precision = next((p for p in _PRECISIONS if rest.endswith(f"-{p}")), "")
    optimizer = rest.removesuffix(f"-{precision}") if precision else ""
    if optimizer not in NAMES:
        raise ConfigError(
            f"--trainer={name!r}: give [lora-]OPTIMIZER-PRECISION, the optimizer one of "
            f"{', '.join(NAMES)}, the precision one of {', '.join(_PRECISIONS)}"
        )
    return rest != name, optimizer, precision
