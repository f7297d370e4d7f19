"""Kinds of policies and of engines, a short check each: the engine follows the trainer's steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rollout_server.bench import model as models
from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import (
    NO_GPU,
    PROMPT,
    Scale,
    Trainer,
    difference,
    greedy,
    quick,
    seconds,
)
from rollout_server.server import RolloutServer

_STEPS = 3
_SAME = 0.1  # nats, of bf16; other weights are further away than that
_SAME_QUANTISED = 0.5


def experts(scale: Scale, found: Findings) -> None:
    """Whose experts are one tensor in the trainer, and one, laid out otherwise, in the engine."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields: dict[str, Any] = dict(
        vocab_size=scale.of(32000, 512),
        hidden_size=scale.of(1024, 128),
        intermediate_size=scale.of(2048, 192),
        moe_intermediate_size=scale.of(512, 64),
        num_experts=scale.of(32, 4),
        num_experts_per_tok=2,
        num_hidden_layers=scale.of(8, 2),
        num_attention_heads=scale.of(16, 4),
        num_key_value_heads=scale.of(4, 2),
        head_dim=scale.of(64, 32),
        max_position_embeddings=2048,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    config = Qwen3MoeConfig(**fields)
    policy = models.built(Qwen3MoeForCausalLM, config, scale.dtype, scale.device)
    with scale.attach(policy, **quick()) as server:
        _follows(found, server, policy, Trainer(policy), "plan")


def layerwise(scale: Scale, found: Findings) -> None:
    """In fp8, quantised as they come in; on a CPU the same way, unquantised."""
    policy = scale.policy("smollm2")
    options: dict[str, Any] = quick(sync_path="layerwise")
    if scale.on_gpu:
        options["engine_args"] |= {"quantization": "fp8"}
    else:
        found.skip("weights in fp8", NO_GPU)
    original = [p.detach().clone() for p in policy.parameters()]
    with scale.attach(policy, **options) as server:
        first = greedy(server, PROMPT)
        same = _SAME_QUANTISED if scale.on_gpu else _SAME
        _follows(found, server, policy, Trainer(policy), "layerwise", same)
        with torch.no_grad():
            for parameter, before in zip(policy.parameters(), original, strict=True):
                parameter.copy_(before)
        server.sync_weights()
        again = greedy(server, PROMPT)
        found.check("with the first weights come the first answers", again.ids == first.ids)


def fsdp(scale: Scale, found: Findings) -> None:
    """Sharded over one rank: its tensors are gathered in buckets."""
    from torch.distributed.fsdp import fully_shard

    with _alone(scale):
        policy = scale.policy("smollm2")
        for layer in policy.model.layers:
            fully_shard(layer)
        fully_shard(policy)
        with scale.attach(policy, **quick(sync_bucket_bytes=scale.of(64 << 20, 1 << 18))) as server:
            _follows(found, server, policy, Trainer(policy), "plan")


@contextmanager
def _alone(scale: Scale) -> Iterator[None]:
    """A process group of this process."""
    dist: Any = torch.distributed  # its stores have no types
    backend = "nccl" if scale.on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _follows(
    found: Findings,
    server: RolloutServer,
    policy: Any,
    trainer: Trainer,
    path: str,
    same: float = _SAME,
) -> None:
    """Each step is seen in the engine's answers, and its log-probabilities are the trainer's."""
    before, gaps, taken = greedy(server, PROMPT), [], []
    gaps.append(difference(policy, before))
    for number in range(1, 1 + _STEPS):
        server.sleep()
        trainer.step()
        taken.append(seconds(server.wake))
        report = server.sync_weights()
        found.check(f"step {number}: by the path {path}", report.path == path,
                    report.reason or report.path)  # fmt: skip
        after = greedy(server, PROMPT)
        gaps.append(difference(policy, after))
        changed = [abs(a - b) for a, b in zip(after.logprobs, before.logprobs, strict=True)]
        found.check(f"step {number} is seen", max(changed) > 0)
        before = after
    found.figure("wake(), the weights with it", sum(taken) / len(taken), "s")
    found.figure("mean gap of log-probabilities, at most", max(gaps), "nats", "a bound", same)
    found.check("trainer and engine agree after each step", max(gaps) < same, max(gaps))
    if path == "plan":  # what was repacked can't be compared
        with found.step("the engine has the policy's weights"):
            server.verify_weights()
