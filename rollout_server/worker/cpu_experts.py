"""Experts on the CPU engine, computed with plain tensors. Runs in the engine's process.

vLLM packs the experts of a mixture for its CPU kernel and drops the originals, so new weights would
have nowhere to go. Here they stay as they are loaded, and each expert that has tokens is two
matrix products of torch's.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

# Its own defaults, which vLLM's kernels have too.
_SWIGLU: Any = SimpleNamespace(alpha=1.702, limit=7.0)


def keep_plain() -> None:
    """Have vLLM make no other experts than such, where this vLLM has the place for it (0.32)."""
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    except ImportError:
        return
    experts: Any = CPUUnquantizedExperts
    experts.process_weights_after_loading = lambda self, layer: None
    experts._supports_grouped_gemm = classmethod(lambda cls, config: (True, None))
    experts.apply = _apply
    experts.rollout_plain = True


def _apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    a1q_scale: Any,
    a2_scale: Any,
    workspace13: Any,
    workspace2: Any,
    expert_tokens_meta: Any,
    apply_router_weight_on_input: bool,
) -> None:
    """As vLLM's `FusedMoEExpertsModular.apply`: each token's experts, weighted and summed."""
    total = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    for expert in topk_ids.unique().tolist():
        local = expert if expert_map is None else int(expert_map[expert])
        if local < 0:  # another rank's
            continue
        tokens, place = torch.where(topk_ids == expert)
        inner = F.linear(hidden_states[tokens], w1[local], _of(self.w1_bias, local))
        outer = F.linear(_activated(activation, inner), w2[local], _of(self.w2_bias, local))
        if not apply_router_weight_on_input:
            outer = outer * topk_weights[tokens, place].unsqueeze(-1)
        total.index_add_(0, tokens, outer.float())
    output.copy_(total)


def _of(biases: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if biases is None else biases[expert]


def _activated(activation: MoEActivation, inner: torch.Tensor) -> torch.Tensor:
    if activation == MoEActivation.SWIGLUOAI:  # in turn: gate, up, gate, up
        return SwigluOAIAndMul.forward_native(_SWIGLU, inner)
    gate, up = inner.chunk(2, dim=-1)
    if activation == MoEActivation.SILU:
        return F.silu(gate) * up
    if activation == MoEActivation.GELU:
        return F.gelu(gate) * up
    if activation == MoEActivation.GELU_TANH:
        return F.gelu(gate, approximate="tanh") * up
    raise NotImplementedError(f"experts with {activation} on the CPU engine")
