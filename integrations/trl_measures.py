"""How far the engine's log-probabilities are from the trainer's, and what sampling cut off."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

Runs = Sequence[tuple[int, int | None]]  # of tokens: (start, end), or to the end


def logp_difference(
    batch: dict[str, Any],
    sampled: list[list[float]],
    masked: Iterable[Runs] = (),
    of_masked: bool = False,
) -> float | None:
    """Mean absolute difference, per token, of the trainer's log-probabilities from the sampled.

    batch: what a trainer scored; GRPO has log-probabilities of shape (B, T), RLOO sums of
    shape (B,), from which the difference of a sequence is spread over its tokens.
    sampled: log-probabilities of one generation, B lists; masked: of each sequence, the runs
    sampled under a grammar; of_masked: whether to count the tokens of these, or the others.
    None if there are none to count, or batch and sampled don't fit together.
    """
    mask = _trained(batch)
    if mask is None:
        return None
    under_grammar = _under_grammar(mask, masked)
    gap = _gap(batch, mask & (under_grammar if of_masked else ~under_grammar))
    if gap is not None:
        return gap.abs().mean().item() if gap.numel() else None
    sums = batch.get("old_logps")
    if sums is None or mask.sum(1).tolist() != [len(s) for s in sampled]:
        return None
    sampled_sums = torch.tensor([sum(s) for s in sampled])
    gap = (sums.detach().float().cpu() - sampled_sums).abs() / mask.sum(1).clamp(min=1)
    gap = gap[(under_grammar & mask).any(1) == of_masked]
    return gap.mean().item() if gap.numel() else None


def truncated_mass(batch: dict[str, Any], masked: Iterable[Runs] = ()) -> float | None:
    """Mean, per token, of the policy's probability mass that top_p, top_k or min_p cut off.

    Of a token that was kept, the engine's probability is the policy's over the mass that was kept,
    so their quotient is that mass. Where the two differ otherwise (a penalty, newer weights), the
    quotient's mean is still, without bias, the mass that the policy gives to what could be sampled.
    None where the trainer has no log-probability of each token (RLOO), or there are none to count.
    """
    mask = _trained(batch)
    if mask is None:
        return None
    gap = _gap(batch, mask & ~_under_grammar(mask, masked))
    return (1 - gap.exp()).mean().item() if gap is not None and gap.numel() else None


def _trained(batch: dict[str, Any]) -> torch.Tensor | None:
    """Which tokens the trainer trains on, (B, T)."""
    mask: torch.Tensor | None = batch.get("completion_mask")
    if mask is None:
        return None
    mask = mask.detach().cpu().bool()
    if batch.get("tool_mask") is not None:
        mask = mask & batch["tool_mask"].detach().cpu().bool()
    return mask


def _under_grammar(mask: torch.Tensor, masked: Iterable[Runs]) -> torch.Tensor:
    under_grammar = torch.zeros_like(mask)
    for row, runs in zip(under_grammar, masked, strict=False):
        for start, end in runs:
            row[start:end] = True
    return under_grammar


def _gap(batch: dict[str, Any], counted: torch.Tensor) -> torch.Tensor | None:
    """The trainer's log-probability less the engine's, of each token that counts."""
    trained, sampled = batch.get("old_per_token_logps"), batch.get("sampling_per_token_logps")
    if trained is None or sampled is None:
        return None
    gap: torch.Tensor = (trained - sampled).detach().float().cpu()
    return gap[counted & ~gap.isnan()]
