"""One MoE layer's recorded decision, as losses and statistics read it.

Shapes: T tokens, N experts (all, zero-computation ones included), K per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


__all__ = ["LayerRouting"]


class LayerRouting(NamedTuple):
    """What one MoE layer decided, as the losses and statistics need it.

    Args:
        logits (`torch.Tensor` of shape `(T, N)`): `RouterOutput.router_logits`.
        index (`torch.Tensor` of shape `(T, K)`): `RouterOutput.top_k_index`; N marks an empty slot.
        probabilities (`torch.Tensor` of shape `(T, N)` or callable, *optional*): The distribution p, or the function
            that makes it from the logits (`router.probabilities`). Softmax of the logits by default.
        balance_weights (`torch.Tensor` of shape `(N,)`, *optional*): eta of the heterogeneous loss.
        penalty (`torch.Tensor` of shape `(T,)`, *optional*): `RouterOutput.penalty`, the router's own loss.
    """

    logits: torch.Tensor
    index: torch.Tensor
    probabilities: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None
    balance_weights: torch.Tensor | None = None
    penalty: torch.Tensor | None = None

    @classmethod
    def from_router(
        cls, router: Any, logits: torch.Tensor, index: torch.Tensor, penalty: torch.Tensor | None = None
    ) -> "LayerRouting":
        """The recorded logits, index and penalty of `router`, with its own `probabilities` and `balance_weights`.

        Where a capacity empties slots, the index is chosen again without it: f counts what tokens asked for, as in
        GShard, Switch and MoE++. What capacity lets through is nearly balanced by construction, and would hide the
        very imbalance the loss is for. (Selection noise, if any, is drawn again.) Slots are in falling order of their
        weight, so the first holds the first choice, the only one that counts under `balance_first_choice`.
        """
        if getattr(router, "capacity_factor", None) is not None and router.training:
            with torch.no_grad():
                index = router.select(router.choice_scores(router.scores(logits), logits))
        if getattr(router, "balance_first_choice", False):
            index = index[:, :1]
        weights = getattr(router, "balance_weights", None)
        return cls(logits, index, getattr(router, "probabilities", None), weights, penalty)

    def distribution(self) -> torch.Tensor:
        """p, `(T, N)`, with gradient to the logits."""
        if self.probabilities is None:
            return torch.softmax(self.logits.float(), dim=-1)
        return self.probabilities(self.logits) if callable(self.probabilities) else self.probabilities
