"""Experts that cost (almost) nothing: constant, copy and zero (MoE++, 2410.07348, Sec. 3.1).

They live outside the experts contract: each is a dense term over all tokens, so nothing is dispatched and the shapes
are static.

Shapes: T tokens, D hidden, C constant experts, Z = constant + copy + zero experts.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


__all__ = ["ZeroComputationExperts"]


class ZeroComputationExperts(nn.Module):
    """zero: 0; copy: x; constant c: a_1 x + a_2 v_c with [a_1, a_2] = softmax(W_c x).

    The experts are ordered constant, copy, zero, as in the released checkpoint.

    Args:
        config: A model config with `hidden_size`, `num_constant_experts`, `num_copy_experts`, `num_zero_experts`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.num_constant = config.num_constant_experts
        self.num_copy = config.num_copy_experts
        self.num_zero = config.num_zero_experts
        self.initializer_range = config.initializer_range
        if self.num_constant:
            self.constants = nn.Parameter(torch.empty(self.num_constant, config.hidden_size))  # v_c
            self.constant_gate = nn.Parameter(torch.empty(self.num_constant, 2, config.hidden_size))  # W_c
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """Z."""
        return self.num_constant + self.num_copy + self.num_zero

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the zero-computation experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens.
            weights (`torch.Tensor` of shape `(T, Z)`): Weight of each expert, 0 where it was not chosen.

        Returns:
            `torch.Tensor` of shape `(T, D)`.
        """
        constant, copy, _ = weights.split([self.num_constant, self.num_copy, self.num_zero], dim=-1)
        share_of_input = copy.sum(dim=-1, keepdim=True)  # (T, 1)
        if not self.num_constant:
            return share_of_input * hidden_states
        gate = F.linear(hidden_states, self.constant_gate.flatten(0, 1)).unflatten(-1, (self.num_constant, 2))
        mix = torch.softmax(gate.float(), dim=-1).to(constant.dtype) * constant.unsqueeze(-1)  # (T, C, 2)
        share_of_input = share_of_input + mix[..., 0].sum(dim=-1, keepdim=True)
        # The constants do not depend on the token: one small product adds all of them.
        return share_of_input * hidden_states + mix[..., 1] @ self.constants.to(mix.dtype)

    def reset_parameters(self) -> None:
        """v_c ~ N(0, 1) and W_c as released, through `transformers.initialization` so that loaded values are kept."""
        if self.num_constant:
            init.normal_(self.constants, mean=0.0, std=1.0)
            init.normal_(self.constant_gate, mean=0.0, std=self.initializer_range)

    def extra_repr(self) -> str:
        return f"constant={self.num_constant}, copy={self.num_copy}, zero={self.num_zero}"
