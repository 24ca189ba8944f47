"""The feed-forward of one layer: channels every token uses, and those of the expert chosen before the first layer.

Shapes: B batch, S sequence, T = B * S tokens, D hidden, N experts, I channels of the dense feed-forward.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from hf_moe.experts.dense import DenseExpert
from hf_moe.experts.registry import build_experts
from hf_moe.layer_config import LayerConfig
from hf_moe.routing.base import BaseRouter
from hf_moe.routing.output import RoutingContext


__all__ = ["PreGate", "ReadMeFeedForward"]


class PreGate(BaseRouter):
    """Hands on the decision of [`ReadMeRouter`], which comes as `RoutingContext.prev_state` `(T, N)`: the best expert,
    with weight 1. It has no parameters; it stands where the layer's router would, so that views, reports and
    overrides find each layer's decision."""

    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        if context.prev_state is None:
            raise ValueError("A layer of `read_me` was called without routing; call the model, not its layers.")
        return context.prev_state.to(hidden_states.device)

    def weigh(self, scores: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(top_k_index, dtype=scores.dtype)


class ReadMeFeedForward(nn.Module):
    """y = sum over c in R of W_d[:, c] a_c + the same over M_j without R, j the token's expert (2410.19123, Sec. 3).

    Args:
        config ([`ReadMeConfig`]): The model's.
        layer_idx (`int`): Index of the decoder layer.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        expert, shared = config.expert_sizes[layer_idx], config.shared_sizes[layer_idx]
        self.gate = self.experts = self.shared = None
        if expert:
            self.gate = PreGate(config, layer_idx)
            self.experts = build_experts(LayerConfig(config, moe_intermediate_size=expert))
        if shared:
            self.shared = DenseExpert(config, shared)
        # M_j as channels of the dense feed-forward: the targets of routing distillation are made with them. All False
        # in a model that was not converted.
        masks = torch.zeros(config.num_experts, config.intermediate_size, dtype=torch.bool)
        self.register_buffer("channel_masks", masks)  # (N, I)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext | None = None) -> torch.Tensor:
        """`(B, S, D) -> (B, S, D)`; `context.prev_state` are the router's logits `(T, N)`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        output = None if self.shared is None else self.shared(tokens)
        if self.gate is not None and self.experts is not None:
            _, weights, index, *_ = self.gate(tokens, context)
            routed = self.experts(tokens, index, weights)
            output = routed if output is None else output + routed
        assert output is not None  # the config has at least one channel
        return output.reshape(hidden_states.shape)

    def reset_masks(self) -> None:
        """Initial values, through `transformers.initialization` so that loaded values are kept."""
        masks: Any = self.channel_masks
        init.zeros_(masks)
