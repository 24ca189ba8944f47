"""Gating residuals of MoE++: a router that also sees the scores the previous layer's router gave.

Shapes: T tokens, D hidden, N = N_ffn + N_zc experts, K per token.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .base import EPSILON, BaseRouter
from .output import RoutingContext
from .registry import register_router


__all__ = ["GatingResidualRouter", "MoePlusPlusReleaseRouter"]


@register_router("gating_residual")
class GatingResidualRouter(BaseRouter):
    """G_1 = W_1 x and G_j = W_j x + W^g_j G_{j-1}, then softmax over all experts and top-K without renormalisation.

    MoE++ (2410.07348), Eqs. 1 and 6. The state handed on is the complete G_j, before softmax. Expert order:
    feed-forward experts, then constant, copy and zero experts. The heterogeneous balance weights (Eq. 7) and
    capacities (Eq. 8) use `config.router_tau`.

    Note: Eq. 8 has no factor K; its T is read as the number of assignments (K x tokens), else 45 % of them would
    be dropped at K = 2. Note: W^g starts at zero (the paper gives no initialisation), so that depth cannot multiply
    the scores up before training asks for it.

    Args:
        num_layers_gate (`int`, defaults to 1): 2 puts a tanh layer of width 8 N before W (as released).
        bias (`bool`, defaults to `False`): A trainable bias per expert. Upcycling uses it to start with the
            zero-computation experts almost unused.
        residual (`bool`, defaults to `True`): `False` gives the ablation without W^g.
    """

    carries_state = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_layers_gate: int = 1,
        bias: bool = False,
        residual: bool = True,
        norm_topk_prob: bool = False,
        **kwargs,
    ):
        super().__init__(config, layer_idx, norm_topk_prob=norm_topk_prob, **kwargs)
        self.num_ffn_experts = config.num_experts
        self.tau = config.router_tau
        width = self.hidden_size
        self.hidden_weight = None
        if num_layers_gate == 2:
            width = 8 * self.num_experts
            self.hidden_weight = nn.Parameter(torch.empty(width, self.hidden_size))
        self.weight = nn.Parameter(torch.empty(self.num_experts, width))
        self.bias = nn.Parameter(torch.empty(self.num_experts)) if bias else None
        # The first MoE layer has no predecessor, so it has no W^g.
        is_first = layer_idx == config.moe_layer_indices[0]
        self.residual_weight = None
        if residual and not is_first:
            previous = getattr(config, "previous_num_routing_targets", self.num_experts)
            self.residual_weight = nn.Parameter(torch.empty(self.num_experts, previous))
        self.reset_parameters()

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        layers = options.get("num_layers_gate", 1)
        if layers not in (1, 2):
            raise ValueError(f"`router_config['num_layers_gate']` must be 1 or 2, got {layers}.")

    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        hidden_states = hidden_states.float()
        if self.hidden_weight is not None:
            hidden_states = torch.tanh(F.linear(hidden_states, self.hidden_weight.float()))  # (T, 8N)
        bias = None if self.bias is None else self.bias.float()
        router_logits = F.linear(hidden_states, self.weight.float(), bias)  # W_j x, (T, N)
        if self.residual_weight is not None and context.prev_state is not None:
            prev_state = context.prev_state.to(router_logits.device).float()
            router_logits = router_logits + F.linear(prev_state, self.residual_weight.float())  # + W^g_j G_{j-1}
        return router_logits

    def next_state(self, router_logits: torch.Tensor) -> torch.Tensor | None:
        return router_logits

    @property
    def balance_weights(self) -> torch.Tensor | None:
        # Eq. 7: eta = 1 for feed-forward experts, tau for zero-computation ones.
        return self._per_expert(1.0, self.tau)

    def capacity(self, num_assignments: torch.Tensor | int) -> torch.Tensor:
        # Eq. 8: C_ffn = gamma tau T / (tau N_ffn + N_zc), C_zc = gamma T / (tau N_ffn + N_zc).
        num_zero_computation = self.num_experts - self.num_ffn_experts
        unit = self.capacity_factor * num_assignments / (self.tau * self.num_ffn_experts + num_zero_computation)
        return unit * self._per_expert(self.tau, 1.0)

    def _per_expert(self, ffn: float, zero_computation: float) -> torch.Tensor:
        is_ffn = torch.arange(self.num_experts, device=self.temperature.device) < self.num_ffn_experts
        return torch.where(is_ffn, ffn, zero_computation)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.weight, mean=0.0, std=self.initializer_range)
        if self.hidden_weight is not None:
            init.normal_(self.hidden_weight, mean=0.0, std=self.initializer_range)
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.residual_weight is not None:
            init.zeros_(self.residual_weight)


@register_router("moepp_release")
class MoePlusPlusReleaseRouter(GatingResidualRouter):
    """The routing of the released MoE++ code, which differs from the paper's equations.

    After softmax and top-K, a slot that fell on a zero expert gets weight 0 and the others are renormalised, so
    "zero + expert a" means expert a with weight 1. The slot keeps the zero expert's index: it was chosen, and losses
    and reports count it. `mixtral_gating=True` is the code's other path: softmax over the chosen logits, no special
    case. The released 7B uses `logit_norm_std=1.0` on the first path.

    Note: the released code may also multiply expert *inputs* by K; that belongs to the block
    (`MoePlusPlusConfig.scale_expert_input`).

    Args:
        mixtral_gating (`bool`, defaults to `False`): Softmax over the K chosen logits.
        logit_norm_std (`float`, *optional*): Divide logits by (their standard deviation over experts / this value)
            before the softmax. The state handed on is not divided.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        mixtral_gating: bool = False,
        logit_norm_std: float | None = None,
        **kwargs,
    ):
        super().__init__(config, layer_idx, **kwargs)
        self.mixtral_gating = mixtral_gating
        self.logit_norm_std = logit_norm_std
        self.num_zero_experts = config.num_zero_experts

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        std = options.get("logit_norm_std")
        if std is not None and not std > 0:
            raise ValueError(f"`router_config['logit_norm_std']` must be above 0 or None, got {std}.")

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        if self.logit_norm_std is not None:  # here, because the next layer receives G as it is
            deviation = router_logits - router_logits.mean(dim=-1, keepdim=True)
            variance = deviation.square().sum(dim=-1, keepdim=True) / (self.num_experts - 1)
            # The epsilon keeps the gradient finite where all logits are equal.
            router_logits = self.logit_norm_std * router_logits / (variance + EPSILON).sqrt()
        return super().scores(router_logits)

    def weigh(self, scores: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        weights = scores.gather(-1, top_k_index)
        if not self.mixtral_gating:  # a zero expert's share goes to the other chosen experts
            weights = weights.masked_fill(top_k_index >= self.num_experts - self.num_zero_experts, 0.0)
        return self.routed_scaling_factor * weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)

    @property
    def choice_differs_from_scores(self) -> bool:
        # A chosen zero expert weighs nothing, so it comes last, but it stays chosen for losses and reports.
        return not self.mixtral_gating
