"""How far the engine's log-probabilities are from the trainer's, in bf16 and in fp32.

In bf16 both are rounded, each in its own way. What is to be expected is told by the trainer alone:
the same weights computed in fp32.
"""

import random
from typing import Any

import torch

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import Scale, quick, trainer_logprobs
from rollout_server.completion import Completion

_QUANTILES = (0.01, 0.5, 0.99)


def measure(scale: Scale, found: Findings) -> None:
    """Of tokens that were sampled at temperature 1."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        with found.step(f"{name}: it could be measured"):
            _measure(scale, found, dtype, name)


def _measure(scale: Scale, found: Findings, dtype: torch.dtype, name: str) -> None:
    policy = scale.policy("smollm2", dtype).eval()
    number, tokens = scale.of((32, 128), (8, 24))
    draw = random.Random(0)
    prompts = [draw.choices(range(10, policy.config.vocab_size), k=16) for _ in range(number)]
    with scale.attach(policy, **quick()) as server:
        asked = {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True}
        completions = server.generate(prompts, asked)
    sampled = torch.tensor([c.logprobs for c in completions]).flatten()
    own = _of_trainer(policy, completions)
    gap = own - sampled
    if dtype == torch.bfloat16:
        rounding = (own - _of_trainer(policy.float(), completions)).abs()
        against, mean, most = "the trainer against itself in fp32", rounding.mean(), rounding.max()
        # Two that are rounded independently are as far apart as the roots of two squares' sum.
        bound = 3 * float(mean) + 1e-3
    else:
        against, mean, most, bound = "a bound", torch.tensor(1e-3), torch.tensor(1e-1), 1e-3
    found.figure(f"{name}: mean gap", float(gap.abs().mean()), "nats", against, float(mean))
    found.figure(f"{name}: largest gap", float(gap.abs().max()), "nats", against, float(most))
    for quantile in _QUANTILES:
        value = float(gap.exp().quantile(quantile))
        found.figure(f"{name}: importance ratio, {quantile:.0%} quantile", value, "", "no gap", 1)
    mean_logprob = float(sampled.mean())
    found.figure(f"{name}: mean log-probability of a sampled token", mean_logprob, "nats")
    seen = f"{float(gap.abs().mean()):.2g}, at most {bound:.2g} nats"
    found.check(f"{name}: the gap is that of the rounding", float(gap.abs().mean()) <= bound, seen)
    many = number * tokens
    found.check(f"{name}: all tokens were compared", sampled.numel() == many, sampled.numel())


def _of_trainer(policy: Any, completions: list[Completion]) -> torch.Tensor:
    """The trainer's log-probabilities of the tokens, one after another."""
    rows = [
        trainer_logprobs(policy, c.prompt_ids, c.ids).cpu()[range(len(c.ids)), c.ids]
        for c in completions
    ]
    return torch.cat(rows)
