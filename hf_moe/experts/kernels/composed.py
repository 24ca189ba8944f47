"""The bank as ordinary tensor operations around [`grouped_linear`].

For what the fused function cannot take: graph capture, which should see the parts it can optimise, and modules whose
activation or norm has parameters of its own, which autograd must see.

Shapes: T tokens, K slots per token, S = T * K slots, N experts, D hidden.
"""

from typing import Any

import torch

from .grouped_linear import grouped_linear


__all__ = ["composed_experts"]


def composed_experts(
    experts: Any,
    parameters: tuple[Any, ...],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Runs an experts module; every shape depends on the shapes of the inputs only.

    Args:
        experts (`torch.nn.Module`): The module, for its flags, its gate and its norm.
        parameters (`tuple`): `(up, up_bias, down, down_bias)` in the dtype of `hidden_states`.
        hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Experts; N and above marks an empty slot.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Weights.

    Returns:
        `torch.Tensor` of shape `(T, D)`.
    """
    up, up_bias, down, down_bias = parameters
    tokens, slots_per_token = top_k_index.shape
    num_experts = up.shape[0]
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (S,) empty slots last
    ends = torch.searchsorted(expert, torch.arange(num_experts, device=expert.device, dtype=expert.dtype), right=True)
    rows = hidden_states[order // slots_per_token]  # (S, D)
    rows = grouped_linear(rows, up, up_bias, ends, experts.is_transposed)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = grouped_linear(rows, down, down_bias, ends, experts.is_transposed)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    # A weight may be anything at an empty slot of an expert-parallel rank: it must not reach the router's gradient.
    weights = top_k_weights.reshape(-1)[order].masked_fill(expert >= num_experts, 0.0)
    rows = rows * weights.unsqueeze(-1)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    return rows[inverse].view(tokens, slots_per_token, hidden_states.shape[-1]).sum(dim=1).to(hidden_states.dtype)
