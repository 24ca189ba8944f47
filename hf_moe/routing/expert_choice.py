"""Expert choice: experts choose their tokens, so that all are equally loaded.

Shapes: T tokens, N experts (all, zero-computation ones included), K slots per token, C tokens per expert.
"""

from typing import Any

import torch

from .output import RouterOutput, RoutingContext
from .registry import register_router
from .variable import VariableLinearRouter


__all__ = ["ExpertChoiceRouter"]

FALLBACKS = ("topk", "expert_choice")


@register_router("expert_choice")
class ExpertChoiceRouter(VariableLinearRouter):
    """S = softmax(h W^T / temperature); every expert takes the C = K T / N tokens that want it most.

    [Mixture-of-Experts with Expert Choice Routing](https://huggingface.co/papers/2202.09368), Sec. 3.2, with K =
    `num_experts_per_tok` as its capacity factor: a token gets K experts on average, between none and N, and the load
    is even without any loss (set `router_aux_loss_coef=0`). Weights are S, not renormalised.

    Whether a token gets an expert depends on the other tokens of the batch, later ones included. That is allowed in
    training; at evaluation it would let a language model look ahead, and no future token exists in `generate`. So
    evaluation is refused unless `fallback` says what to do instead.

    Note: C is rounded up, and padding tokens neither count nor compete. A `max_experts` below N drops the experts of
    which a token's share is smallest.

    Args:
        fallback (`str`, *optional*): At evaluation, `"topk"`: each token takes its own K best experts, as a causal
            model must; `"expert_choice"`: as in training, for encoders, which know all tokens.
        max_experts (`int`, *optional*): The most experts a token may get; N by default, which is exact.

    Raises:
        ValueError: (in `forward`) evaluation without `fallback`.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(
    ...     router_type="expert_choice", router_aux_loss_coef=0, router_config={"fallback": "topk"}
    ... )
    ```
    """

    def __init__(self, config: Any, layer_idx: int, *, fallback: str | None = None, **kwargs):
        super().__init__(config, layer_idx, **kwargs)
        self.fallback = fallback
        self.num_experts_per_tok = config.num_experts_per_tok

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        fallback = options.get("fallback")
        if fallback not in (None, *FALLBACKS):
            raise ValueError(
                f"`router_config['fallback']` must be None or one of {list(FALLBACKS)}, got {fallback!r}."
            )
        if config.expert_capacity_factor is not None:
            raise ValueError(
                "`expert_capacity_factor` has no meaning with `router_type='expert_choice'`, whose experts all take "
                "the same number of tokens. Set it to None; `num_experts_per_tok` says how many."
            )

    @property
    def non_causal(self) -> bool:
        """Whether tokens are chosen among all of the batch: in training, and at evaluation unless each chooses."""
        return self.training or self.fallback != "topk"

    def chosen(self, scores: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Which expert takes which token.

        Args:
            scores (`torch.Tensor` of shape `(T, N)`): S.
            token_mask (`torch.Tensor` of shape `(T,)`, *optional*): `False` on padding.

        Returns:
            `torch.Tensor` of shape `(T, N)`, boolean.
        """
        real = torch.ones_like(scores[:, 0], dtype=torch.bool) if token_mask is None else token_mask.reshape(-1)
        if self.non_causal:
            wanted = scores.masked_fill(~real.unsqueeze(-1), -1.0)
            order = torch.argsort(wanted, dim=0, descending=True, stable=True)  # (T, N), tokens by their wish
            rank = torch.arange(scores.shape[0], device=scores.device).unsqueeze(-1).expand_as(order)
            rank = torch.empty_like(order).scatter(0, order, rank)
            kept = rank < self.num_experts_per_tok * real.sum() / self.num_experts
        else:
            best = torch.topk(scores, self.num_experts_per_tok, dim=-1).indices
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return kept & real.unsqueeze(-1)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext | None = None) -> RouterOutput:
        # A pipeline of its own: a token's choice is not its own.
        if not self.training and self.fallback is None:
            raise ValueError(
                "`router_type='expert_choice'` chooses among all tokens of a batch, later ones included, so a causal "
                "model cannot be evaluated or generate with it. Set `router_config={'fallback': 'topk'}`: each token "
                "then takes its own best experts. For an encoder, set it to 'expert_choice'."
            )
        context = context if context is not None else RoutingContext()
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits, soft = self.compute_logits(hidden_states, context), self.soft_permutation()
            router_logits = self.relabel(router_logits, soft)  # (T, N)
            scores = self.scores(router_logits)
            with torch.no_grad():
                kept = self.chosen(scores, context.token_mask)
                _, index = torch.topk(scores.masked_fill(~kept, -1.0), self.num_slots, dim=-1)  # (T, K)
                index = index.masked_fill(~kept.gather(-1, index), self.num_experts)
            weights = self.weigh(scores, index)
            router_logits, index, weights, penalty = self.mix(router_logits, index, weights, None, soft)
            index, weights = self.post_process(index, weights, context)
        return RouterOutput(router_logits, weights.to(hidden_states.dtype), index, None, penalty)
