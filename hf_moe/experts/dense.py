"""One dense feed-forward of the same form as the experts of a layer: shared experts and residual branches."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .registry import experts_class


__all__ = ["DenseExpert"]


class DenseExpert(nn.Module):
    """A feed-forward every token passes through, gated and biased as `config.expert_type` is.

    Args:
        config: A model config with `hidden_size`, `expert_type` and `expert_activation`.
        intermediate_size (`int`): Width I.
    """

    def __init__(self, config: Any, intermediate_size: int):
        super().__init__()
        bank = experts_class(config.expert_type)
        if bank.gated:
            self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bank.biased)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bank.biased)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=bank.biased)
        self.act_fn = ACT2FN[config.expert_activation]
        self.gated = bank.gated

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D) -> (..., D)`."""
        state = self.up_proj(hidden_states)
        state = self.act_fn(self.gate_proj(hidden_states)) * state if self.gated else self.act_fn(state)
        return self.down_proj(state)
