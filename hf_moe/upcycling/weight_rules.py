"""How the selected experts' outputs are weighed, and which families of transformers follow which rule.

Shapes: T tokens, N experts, K per token.
"""

from dataclasses import dataclass
from typing import Any

import torch


__all__ = ["WeightRule", "resolve_weight_rule", "weight_rule_of"]


@dataclass(frozen=True)
class WeightRule:
    """One of the rules by which y = sum over the selected e of w_e F_e gets its weights.

    - `"renormalise"`: softmax, divided by the sum over the selected (equals softmax of the selected logits);
    - `"softmax"`: softmax over all experts, not renormalised;
    - `"sigmoid"`: sigmoid, divided by the sum over the selected.

    Args:
        name (`str`): Which.
        factor (`float`, defaults to 1.0): Multiplies the weights (`routed_scaling_factor`).

    Example:

    ```python
    >>> weights, index = WeightRule("renormalise").apply(router_logits, top_k=2)  # rows of `weights` sum to 1
    ```
    """

    name: str
    factor: float = 1.0

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"`weights` must be one of {list(NAMES)}, got {self.name!r}.")
        if not self.factor > 0:
            raise ValueError(f"The factor of a weight rule must be above 0, got {self.factor}.")

    def total(self, top_k: int, num_experts: int) -> float | None:
        """Sum of a token's weights; `None` where it depends on the token."""
        if self.name == "softmax" and top_k < num_experts:
            return None
        return self.factor

    def typical_total(self, top_k: int, num_experts: int) -> float:
        """The sum, or what it is for a router without preference (all experts equally probable)."""
        total = self.total(top_k, num_experts)
        return self.factor * top_k / num_experts if total is None else total

    def apply(self, router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rule itself.

        Args:
            router_logits (`torch.Tensor` of shape `(T, N)`): Router scores.
            top_k (`int`): K.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Weights and expert indices, both `(T, K)`.
        """
        logits = router_logits.float()
        scores = torch.sigmoid(logits) if self.name == "sigmoid" else torch.softmax(logits, dim=-1)
        weights, index = scores.topk(top_k, dim=-1)
        if self.name != "softmax":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.factor * weights, index


NAMES = ("renormalise", "softmax", "sigmoid")


def resolve_weight_rule(weights: str | WeightRule) -> WeightRule:
    """`"renormalise"`, `"softmax"`, `"sigmoid"` or a [`WeightRule`] -> [`WeightRule`].

    Raises:
        ValueError: an unknown name.
        TypeError: neither a string nor a rule.
    """
    if isinstance(weights, WeightRule):
        return weights
    if not isinstance(weights, str):
        raise TypeError(f"`weights` must be one of {list(NAMES)} or a WeightRule, got {type(weights).__name__}.")
    return WeightRule(weights)


# Families with one rule; the others are told apart by their config. Read in transformers 5.23.
ONE_RULE = {
    "deepseek_v2": "softmax",
    "gpt_oss": "renormalise",
    "granitemoe": "renormalise",
    "granitemoehybrid": "renormalise",
    "granitemoeshared": "renormalise",
    "jamba": "softmax",
    "minimax": "renormalise",
    "mixtral": "renormalise",
}
NORM_TOPK = ("flex_olmo", "olmoe", "qwen2_moe", "qwen3_moe")
SIGMOID = ("deepseek_v3", "glm4_moe")


def weight_rule_of(config: Any) -> WeightRule | None:
    """The rule of a MoE config of transformers, `None` where it is none of the three.

    phimoe's weights sum to a token-dependent value in (1, 2], llama4 scales the experts' input: both give `None`.
    """
    kind = getattr(config, "model_type", None)
    if kind in ONE_RULE:
        factor = getattr(config, "routed_scaling_factor", 1.0) if kind == "deepseek_v2" else 1.0
        return WeightRule(ONE_RULE[kind], factor)
    if kind in NORM_TOPK:
        return WeightRule("renormalise" if config.norm_topk_prob else "softmax")
    if kind in SIGMOID and getattr(config, "norm_topk_prob", True):
        return WeightRule("sigmoid", float(config.routed_scaling_factor))
    return None
