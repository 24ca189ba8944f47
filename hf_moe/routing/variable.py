"""Routers that give every token as many experts as it needs: slots that are not needed stay empty.

Shapes: T tokens, D hidden, N experts (all, zero-computation ones included), K slots per token.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .base import EPSILON, BaseRouter
from .output import RoutingContext


__all__ = ["VariableLinearRouter", "VariableRouter"]


class VariableRouter(BaseRouter):
    """Base of routers with a variable number of experts per token; a subclass says in `keep` which slots are used.

    The number of slots is fixed (shapes stay static under compilation), and a slot that is not used is empty:
    `top_k_index == num_experts`, weight 0. Experts skip empty slots, so time follows the slots in use.

    Args:
        max_experts (`int`, *optional*): K, the most experts a token may get; all N by default. `num_experts_per_tok`
            is not used unless the router says so.
        norm_topk_prob (`bool`, defaults to `False`): Renormalise the weights of the experts in use to sum 1.
    """

    variable_slots = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        max_experts: int | None = None,
        norm_topk_prob: bool = False,
        **kwargs,
    ):
        super().__init__(config, layer_idx, norm_topk_prob=norm_topk_prob, **kwargs)
        self.max_experts = self.num_experts if max_experts is None else max_experts
        self.top_k = self.max_experts

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        most, experts = options.get("max_experts"), config.num_routing_targets
        if most is not None and not 1 <= most <= experts:
            raise ValueError(
                f"`router_config['max_experts']` must be between 1 and the number of experts ({experts}), got {most}."
            )
        if getattr(config, "router_bias_update_speed", 0.0) > 0:
            raise ValueError(
                f"`router_bias_update_speed` has no selection bias to move in `router_type={cls.router_type!r}`. "
                "Set it to 0, or use 'softmax_topk' or 'sigmoid_topk'."
            )

    def keep(self, sorted_scores: torch.Tensor) -> torch.Tensor:
        """Which slots are in use, given the `K` best choice scores of each token in falling order.

        Args:
            sorted_scores (`torch.Tensor` of shape `(T, K)`): Choice scores, best first.

        Returns:
            `torch.Tensor` of shape `(T, K)`, boolean: used slots first.
        """
        raise TypeError(f"{type(self).__name__} must define `keep`.")

    def select(self, choice_scores: torch.Tensor) -> torch.Tensor:
        values, index = torch.topk(choice_scores, self.num_slots, dim=-1)
        return index.masked_fill(~self.keep(values), self.num_experts)  # (T, K)

    def weigh(self, scores: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        empty = top_k_index == self.num_experts
        weights = scores.gather(-1, top_k_index.clamp(max=self.num_experts - 1)).masked_fill(empty, 0.0)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
        return weights * self.routed_scaling_factor


class VariableLinearRouter(VariableRouter):
    """A [`VariableRouter`] whose logits are one matrix product, h W^T, in float32."""

    def __init__(self, config: Any, layer_idx: int, **kwargs):
        super().__init__(config, layer_idx, **kwargs)
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        self.reset_parameters()

    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return F.linear(hidden_states.float(), self.weight.float())  # (T, N)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.weight, mean=0.0, std=self.initializer_range)
