"""The MoE block: router + experts (+ zero-computation experts, shared experts, residual branch).

Shapes: B batch, S sequence, T = B * S tokens, D hidden, N feed-forward and Z zero-computation experts, K per token.
"""

from typing import Any

import torch
from torch import nn

from .experts.dense import DenseExpert
from .experts.registry import build_experts
from .experts.zero_computation import ZeroComputationExperts
from .layer_config import layer_config
from .routing.capacity import trim_slots
from .routing.output import RoutingContext
from .routing.registry import build_router


__all__ = ["MoeBlock"]


class MoeBlock(nn.Module):
    """Replaces one feed-forward. The router is `gate`, the stacked experts are `experts`: the names that
    expert-parallel plans, quantizers and PEFT's `target_parameters` look for.

    y = sum_k w_k E_k(x) + shared(x), or with a residual branch (PR-MoE, DeepSpeed-MoE 2201.05596, Sec. 4.1)
    y = c_0 MoE(x) + c_1 F(x), c = softmax(W x + b); with `residual_combine="sum"`, y = MoE(x) + F(x).

    Args:
        config: A model config with the fields of [`MoeConfigMixin`]; where its `num_experts` is a list, the block has
            the number of its layer.
        layer_idx (`int`): Index of the decoder layer.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        config = layer_config(config, layer_idx)
        self.num_experts = config.num_experts
        self.gate = build_router(config, layer_idx)
        self.experts = build_experts(config)
        self.zero_experts = ZeroComputationExperts(config) if config.num_zero_computation_experts else None
        self.scale_expert_input = getattr(config, "scale_expert_input", False)
        self.shared_experts = self.shared_gate = self.residual_expert = self.residual_gate = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.shared_expert_intermediate_size
            self.shared_experts = DenseExpert(config, width)
            if config.shared_expert_gate:
                self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False)
        if config.residual_expert:
            self.residual_expert = DenseExpert(config, config.intermediate_width)
            if config.residual_combine == "softmax":
                self.residual_gate = nn.Linear(config.hidden_size, 2)

    def forward(
        self, hidden_states: torch.Tensor, context: RoutingContext | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Routes and mixes.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, D)`): Input of the feed-forward.
            context ([`RoutingContext`], *optional*): What the router may want to know.

        Returns:
            `hidden_states` of shape `(B, S, D)` and the router's state (`None` where the router keeps none).
        """
        shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, shape[-1])  # (T, D)
        _, weights, index, state, *_ = self.gate(tokens, context)
        output = self.mix(tokens, index, weights)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(tokens)) * shared
            output = output + shared
        if self.residual_expert is not None:
            dense = self.residual_expert(tokens)
            if self.residual_gate is not None:
                c = torch.softmax(self.residual_gate(tokens), dim=-1)  # (T, 2)
                output, dense = c[:, :1] * output, c[:, 1:] * dense
            output = output + dense
        return output.reshape(shape), state

    def mix(self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the routed experts, `(T, D)`.

        Zero-computation experts have the indices from N on; to the feed-forward experts these slots are empty.
        """
        expert_input = tokens * index.shape[-1] if self.scale_expert_input else tokens
        ffn_index, ffn_weights = index, weights
        if self.zero_experts is not None:
            ffn_index = index.clamp(max=self.num_experts)
            ffn_weights = weights.masked_fill(index >= self.num_experts, 0.0)
        if self.experts.num_experts != self.num_experts:
            # Expert parallel: the exchange of tokens knows no empty slots, so they visit some expert, with weight 0.
            visited = torch.arange(index.shape[0], device=index.device).unsqueeze(-1) % self.num_experts
            ffn_index = torch.where(ffn_index < self.num_experts, ffn_index, visited)
        elif getattr(self.gate, "variable_slots", False):
            ffn_index, ffn_weights = trim_slots(ffn_index, ffn_weights, self.num_experts)
        output = self.experts(expert_input, ffn_index, ffn_weights)
        if self.zero_experts is None:
            return output
        # w_zc = scatter(weights, index)[:, N:]; the last column collects slots that are empty altogether.
        columns = self.num_experts + self.zero_experts.num_experts + 1
        dense = weights.new_zeros(index.shape[0], columns).scatter_add(-1, index, weights)  # (T, N + Z + 1)
        return output + self.zero_experts(expert_input, dense[:, self.num_experts : -1])
