"""SMoE-Dropout: a random router that never learns, and a number of active experts that grows during training.

Shapes: T tokens, D hidden, N experts (all, zero-computation ones included), K slots per token.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import initialization as init

from .output import RoutingContext
from .registry import register_router
from .schedules import parse_schedules
from .variable import VariableRouter


__all__ = ["FixedRandomRouter"]


@register_router("fixed_random")
class FixedRandomRouter(VariableRouter):
    """l = h R^T + r with fixed random R and r; softmax over the k best logits; k may change at any time.

    [SMoE-Dropout](https://huggingface.co/papers/2303.01610), Sec. 3.2: k grows linearly over training, and the trained
    model runs with any k. R and r are buffers: no optimizer, weight decay or `requires_grad_` reaches them, and they
    are saved with the model. k is the 0-dim buffer `k`, at first `num_experts_per_tok`; a schedule of it is rounded.
    The method has no balance loss: set `router_aux_loss_coef=0`.

    Args:
        norm_topk_prob (`bool`, defaults to `True`): Softmax over the k best, as in the paper.
        max_experts (`int`, *optional*): The largest k; N by default. Fewer slots are cheaper under compilation.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> growing = {"k": {"type": "linear", "start": 2, "end": 8, "num_steps": 1.0}}
    >>> config = MoeLlamaConfig(
    ...     router_type="fixed_random", router_aux_loss_coef=0, router_config={"schedules": growing}
    ... )
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> apply_schedules(model, parse_schedules({"k": 4}), step=0)  # evaluate with four experts
    ```
    """

    k: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, config: Any, layer_idx: int, *, norm_topk_prob: bool = True, **kwargs):
        super().__init__(config, layer_idx, norm_topk_prob=norm_topk_prob, **kwargs)
        self.initial_k = config.num_experts_per_tok
        self.register_buffer("weight", torch.empty(self.num_experts, self.hidden_size))
        self.register_buffer("bias", torch.empty(self.num_experts))
        self.register_buffer("k", torch.tensor(self.initial_k))
        self.reset_parameters()

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        most = options.get("max_experts")
        if most is not None and most < config.num_experts_per_tok:
            raise ValueError(
                f"`router_config['max_experts']` must be at least `num_experts_per_tok` "
                f"({config.num_experts_per_tok}), got {most}."
            )
        schedule = parse_schedules(options.get("schedules") or {}).get("k")
        if schedule is not None and schedule.lowest() < 1:
            raise ValueError(f"the schedule of `k` reaches {schedule.lowest()}, but must stay at least 1.")
        slots = config.num_routing_targets if most is None else most
        if schedule is not None and schedule.highest() > slots:
            raise ValueError(
                f"the schedule of `k` reaches {schedule.highest():g}, but a token may get {slots} experts at most. "
                "End it there, or raise `num_experts` or `router_config['max_experts']`."
            )

    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        return F.linear(hidden_states.float(), self.weight.float(), self.bias.float())  # (T, N)

    def keep(self, sorted_scores: torch.Tensor) -> torch.Tensor:
        rank = torch.arange(sorted_scores.shape[-1], device=sorted_scores.device)
        return (rank < self.k).expand(sorted_scores.shape)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        bound = self.hidden_size**-0.5  # as `nn.Linear` starts, which the released code leaves as it is
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)
        init.constant_(self.k, self.initial_k)
