"""Dynamic routing: a token takes the fewest experts whose probabilities add up to p.

Shapes: T tokens, N experts (all, zero-computation ones included), K slots per token.
"""

from typing import Any

import torch
from transformers import initialization as init

from .registry import register_router
from .schedules import parse_schedules
from .variable import VariableLinearRouter


__all__ = ["TopPRouter"]


@register_router("top_p")
class TopPRouter(VariableLinearRouter):
    """P = softmax(h W^T); S = the t most probable experts, t the smallest number with sum P >= p; weights P on S.

    [Dynamic routing](https://huggingface.co/papers/2403.07652), Sec. 3: confident tokens use one expert, uncertain
    ones many. Weights are not renormalised, as released, so a layer's output scale is between p and 1 times that of
    one expert. In training the entropy of P, -sum P log P, is added to the loss times `entropy_coef` (a mean over
    tokens and layers): without it the router can flatten P to use more experts. `num_experts_per_tok` is not used.

    Note: t is counted with sum >= p, as in the paper; the released code has sum > p, which differs only where a sum
    is exactly p. Note: the paper's balance loss at perfect balance is the mean of |S|; the one all routers share is 1.

    Args:
        p (`float`, defaults to 0.4): Threshold in (0, 1]; 1 takes all experts. Kept in a 0-dim buffer that a schedule
            may write.
        entropy_coef (`float`, defaults to 1e-4): Weight of the entropy loss.
        max_experts (`int`, *optional*): The most experts a token may get; N by default, which is exact.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(router_type="top_p", num_experts=16, router_config={"p": 0.4, "max_experts": 8})
    ```
    """

    p: torch.Tensor

    def __init__(self, config: Any, layer_idx: int, *, p: float = 0.4, entropy_coef: float = 1e-4, **kwargs):
        super().__init__(config, layer_idx, **kwargs)
        self.initial_p = float(p)
        self.entropy_coef = entropy_coef
        self.register_buffer("p", torch.tensor(self.initial_p))

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        p = options.get("p", 0.4)
        if not 0 < p <= 1:
            raise ValueError(f"`router_config['p']` must be above 0 and at most 1, got {p}.")
        schedule = parse_schedules(options.get("schedules") or {}).get("p")
        if schedule is not None and not schedule.lowest() > 0:
            raise ValueError(f"the schedule of `p` reaches {schedule.lowest()}, but must stay above 0.")
        if schedule is not None and schedule.highest() > 1:
            raise ValueError(f"the schedule of `p` reaches {schedule.highest()}, but must stay at most 1.")
        coefficient = options.get("entropy_coef", 1e-4)
        if not 0 <= coefficient < float("inf"):
            raise ValueError(f"`router_config['entropy_coef']` must be at least 0 and finite, got {coefficient}.")

    @classmethod
    def has_penalty(cls, **options) -> bool:
        return options.get("entropy_coef", 1e-4) > 0 or super().has_penalty(**options)

    def keep(self, sorted_scores: torch.Tensor) -> torch.Tensor:
        # What the better experts add up to; not cumsum - P, whose rounding would decide ties.
        before = torch.zeros_like(sorted_scores)
        before[:, 1:] = sorted_scores.cumsum(dim=-1)[:, :-1]
        p = self.p.float()
        return (before < p) | (p >= 1)  # rounded sums may reach 1 before the last expert

    def penalty(self, router_logits: torch.Tensor) -> torch.Tensor | None:
        if not self.entropy_coef:
            return None
        log_p = torch.log_softmax(router_logits / self.temperature.float(), dim=-1)
        return -self.entropy_coef * (log_p.exp() * log_p).sum(dim=-1)  # (T,)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "initial_p"):
            init.constant_(self.p, self.initial_p)
