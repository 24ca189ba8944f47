"""Sparse upcycling: every expert is a copy of the dense feed-forward (2212.05055)."""

from dataclasses import dataclass

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.weight_rules import WeightRule

from .base import ExpertBuilder


__all__ = ["Copy", "copies_exactness"]


@dataclass(frozen=True)
class Copy(ExpertBuilder):
    """`N` copies. With weights that sum to 1 the layer is the dense one for any router and any K:
    sum_e w_e F(x) = F(x).

    For the same reason the language-model loss gives the router no gradient at the first step; routing is learnt once
    the experts have drifted apart, which they do because they see different tokens.

    Example:

    ```python
    >>> moe, report = upcycle(dense, num_experts=8, top_k=2, experts=Copy())
    ```
    """

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        return [ffn] * num_experts

    def exactness(self, rule, top_k, num_experts, router=None):
        return copies_exactness(rule, top_k, num_experts)


def copies_exactness(rule: WeightRule, top_k: int, num_experts: int) -> Exactness:
    """Exactness of experts that are all equal to the dense feed-forward."""
    scale = 1.0 / rule.typical_total(top_k, num_experts)
    if rule.total(top_k, num_experts) is not None:
        return Exactness(True, "all experts are the dense feed-forward and the weights have a fixed sum", scale)
    return Exactness(
        False,
        f"softmax weights of {top_k} out of {num_experts} experts sum to a value that depends on the token; the scale "
        f"{scale:g} is right only where all experts are equally probable",
        scale,
    )
