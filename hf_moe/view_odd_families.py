"""Rules of the families whose routers do something that fields of a [`FamilyRule`] cannot say.

Shapes: T tokens, N experts, K per token.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .view_rules import FamilyRule


__all__ = ["PhimoeRule"]


@dataclass(frozen=True)
class PhimoeRule(FamilyRule):
    """Phi-3.5-MoE's sparse mixer: the weight of each expert is a softmax of its own, over the experts not better than
    it, without those far below it. The weights of a token sum to between 1 and 2.

    The router knows two experts. The r-th is weighed the same way: by the softmax without the r - 1 better ones. The
    plain softmax, which the first of these starts from, is what counts as the distribution over the experts.
    """

    score: str = "softmax"
    choose_by: str = "logits"
    float32_scores: bool = False

    def num_experts_per_tok(self, router: Any, block: Any) -> int:
        return 2  # hard-wired in the router, whatever its `top_k`

    def weigh(
        self, router: Any, scores: torch.Tensor, router_logits: torch.Tensor, top_k_index: torch.Tensor
    ) -> torch.Tensor:
        chosen = router_logits.gather(-1, top_k_index).unsqueeze(-1)  # (T, K', 1)
        logits = router_logits.unsqueeze(-2)  # (T, 1, N)
        better = logits > chosen  # (T, K', N)
        # mask = (best - s) / max(|s|, best) > 2 eps, as the router has it
        far = (chosen - logits) / logits.abs().clamp(min=chosen) > 2 * router.router_jitter_noise
        gates = logits.masked_fill(better | far, -torch.inf).softmax(dim=-1)  # (T, K', N)
        return gates.gather(-1, top_k_index.unsqueeze(-1)).squeeze(-1)
