"""Rules of the families whose routers do something that fields of a [`FamilyRule`] cannot say.

Shapes: T tokens, N experts, K per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .view_rules import FamilyRule, Routing


__all__ = [
    "CohereRule",
    "DenseScoresRule",
    "DividedRule",
    "InklingRule",
    "LongcatRule",
    "OneHotRule",
    "PerExpertScaleRule",
    "PhimoeRule",
    "ZayaRule",
]


@dataclass(frozen=True)
class PhimoeRule(FamilyRule):
    """Phi-3.5-MoE's sparse mixer: the weight of each expert is a softmax of its own, over the experts not better than
    it, without those far below it. The weights of a token sum to between 1 and 2.

    The router knows two experts. The r-th is weighed the same way: by the softmax without the r - 1 better ones. The
    plain softmax, which the first of these starts from, is what counts as the distribution over the experts.
    """

    score: str = "softmax"
    choose_by: str = "logits"
    normalise: str = "masked softmax"
    top_k: str = "2, fixed"
    float32_scores: bool = False

    def num_experts_per_tok(self, router: Any) -> int:
        return 2  # hard-wired in the router, whatever its `top_k`

    def normalisation(self, router: Any) -> str:
        return self.normalise

    def weigh(
        self,
        router: Any,
        scores: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        args: tuple = (),
        tokens: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        chosen = router_logits.gather(-1, top_k_index).unsqueeze(-1)  # (T, K', 1)
        logits = router_logits.unsqueeze(-2)  # (T, 1, N)
        better = logits > chosen  # (T, K', N)
        # far below: (best - s) / max(|s|, best) > 2 eps
        far = (chosen - logits) / logits.abs().clamp(min=chosen) > 2 * router.router_jitter_noise
        gates = logits.masked_fill(better | far, -torch.inf).softmax(dim=-1)  # (T, K', N)
        return gates.gather(-1, top_k_index.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class CohereRule(FamilyRule):
    """Cohere 2 MoE: the router's `expert_selection_fn` says softmax of the chosen logits, or sigmoid."""

    score: str = "router.expert_selection_fn"
    choose_by: str = "logits"
    normalise: str = "norm_topk_prob"
    float32_scores: bool = False

    def normalisation(self, router: Any) -> str:
        return "softmax" if router.expert_selection_fn == "softmax" else super().normalisation(router)

    def softmax_of_chosen(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class DividedRule(FamilyRule):
    """Softmax of the chosen logits, divided by the router's `top_k`, which its block multiplies with again."""

    score: str = "softmax"
    choose_by: str = "logits"
    normalise: str = "softmax"
    float32_scores: bool = False

    def weigh(self, router: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().weigh(router, *args, **kwargs) / router.top_k


@dataclass(frozen=True)
class PerExpertScaleRule(FamilyRule):
    """Gemma 4: probabilities where other routers return logits, and a trained factor per expert on the weights."""

    score: str = "none"
    top_k: str = "config.top_k_experts"
    normalise: str = "always"

    def num_experts(self, router: Any) -> int:
        return router.per_expert_scale.shape[0]

    def weigh(
        self,
        router: Any,
        scores: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        args: tuple = (),
        tokens: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        weights = super().weigh(router, scores, router_logits, top_k_index)
        return weights * router.per_expert_scale[top_k_index]


@dataclass(frozen=True)
class LongcatRule(FamilyRule):
    """LongCat-Flash: experts that return their input come after those that compute."""

    score: str = "softmax"
    bias: str | None = "e_score_correction_bias"
    scale: str | None = "routed_scaling_factor"
    ordered: bool = False

    def num_experts(self, router: Any) -> int:
        return router.n_routed_experts

    def idle_experts(self, router: Any) -> tuple[str, ...]:
        return tuple(f"identity {i}" for i in range(router.n_routed_experts - router.num_experts))

    def write(self, router: Any, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        if top_k_index.shape[-1] == 1:  # its experts fail on a table of one column
            top_k_index = top_k_index.expand(-1, 2)
            top_k_weights = F.pad(top_k_weights, (0, 1))
        return super().write(router, output, top_k_weights, top_k_index)


@dataclass(frozen=True)
class ZayaRule(FamilyRule):
    """Zaya: the last of N choices is to skip the experts. The router returns expert 0 with weight 0 for it."""

    score: str = "softmax"
    bias: str | None = "balancing_biases"
    float32_scores: bool = False

    def num_experts(self, router: Any) -> int:
        return router.num_router_classes

    def idle_experts(self, router: Any) -> tuple[str, ...]:
        return ("skip",)

    def read(self, router: Any, output: Any) -> Routing:
        routing = super().read(router, output)
        skipped = (routing.top_k_weights == 0) & (routing.top_k_index == 0)
        return routing._replace(top_k_index=routing.top_k_index.masked_fill(skipped, router.num_experts))

    def write(self, router: Any, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        skipped = top_k_index >= router.num_experts
        return super().write(
            router, output, top_k_weights.masked_fill(skipped, 0.0), top_k_index.masked_fill(skipped, 0)
        )


@dataclass(frozen=True)
class InklingRule(FamilyRule):
    """Inkling: routed and shared experts share one normalisation, so that other routed experts change the weights of
    the shared ones, which the router returns too."""

    score: str = "sigmoid"
    bias: str | None = "e_score_correction_bias"
    normalise: str = "sum with shared experts"
    scale: str | None = "route_scale"
    ordered: bool = False

    def normalisation(self, router: Any) -> str:
        return self.normalise

    def weigh(
        self,
        router: Any,
        scores: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        args: tuple = (),
        tokens: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        flat = args[0].reshape(-1, router.hidden_dim)
        flat = flat if tokens is None else flat[tokens]
        with torch.autocast(flat.device.type, enabled=False):
            shared = F.linear(flat.float(), router.weight.float())[:, -router.n_shared_experts :]
            log_probabilities = F.logsigmoid(torch.cat([router_logits.gather(-1, top_k_index), shared], dim=-1))
            weights = torch.exp(log_probabilities - torch.logsumexp(log_probabilities, dim=-1, keepdim=True))
            weights = weights * router.route_scale * router.global_scale.float()
        return weights[:, : top_k_index.shape[-1]]

    def write(self, router: Any, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        # Every weight is sigmoid(logit) / Z times a constant. What the first slot says of Z before and after is what
        # the shared experts' weights have to be multiplied with.
        logits, weights, index = self.read(router, output)
        before = weights[:, :1].float() / logits.gather(-1, index[:, :1]).sigmoid()
        first = top_k_index[:, :1].clamp(max=router.num_experts - 1)
        after = top_k_weights[:, :1].float() / logits.gather(-1, first).sigmoid()
        ratio = torch.where((top_k_weights[:, :1] == weights[:, :1]) & (first == index[:, :1]), 1.0, after / before)
        shared = output[3] * ratio.reshape(*output[3].shape[:-1], 1)
        return (*super().write(router, output, top_k_weights, top_k_index)[:3], shared.to(output[3].dtype))


@dataclass(frozen=True)
class DenseScoresRule(FamilyRule):
    """Llama 4: the router returns `(T, N)` scores, 0 for experts not chosen, and logits; experts scale their input."""

    score: str = "sigmoid"
    router_logits: int = 1
    top_k_weights: int = 0
    top_k_index: int = -1  # none
    choose_by: str = "logits"

    def read(self, router: Any, output: Any) -> Routing:
        scores, logits = output
        slots = router.top_k
        if not torch.compiler.is_compiling():  # an override may have chosen more or fewer
            slots = max(int((scores > 0).sum(dim=-1).max()), 1) if scores.numel() else slots
        weights, index = scores.topk(slots, dim=-1)
        return Routing(logits, weights, index.masked_fill(weights == 0, router.num_experts))

    def write(self, router: Any, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        scores, logits = output
        # Added, because slots of weight 0 may name an expert that another slot names.
        index = top_k_index.clamp(max=router.num_experts - 1)
        return torch.zeros_like(scores).scatter_add(-1, index, top_k_weights.to(scores.dtype)), logits


@dataclass(frozen=True)
class OneHotRule(FamilyRule):
    """Switch Transformers: one expert per token as a one-hot `(B, S, N)` mask, and a capacity per sequence."""

    score: str = "softmax"
    router_logits: int = 2
    top_k_weights: int = 1
    top_k_index: int = 0
    top_k: str = "1, fixed"
    float32_scores: bool = False

    def num_experts_per_tok(self, router: Any) -> int:
        return 1

    def max_slots(self, router: Any) -> int | None:
        return 1

    def read(self, router: Any, output: Any) -> Routing:
        mask, weights, logits = (tensor.reshape(-1, tensor.shape[-1]) for tensor in output)
        dropped = mask.sum(dim=-1, keepdim=True) == 0
        index = mask.argmax(dim=-1, keepdim=True).masked_fill(dropped, router.num_experts)
        return Routing(logits, weights.masked_fill(dropped, 0.0), index)

    def write(self, router: Any, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        mask, weights, logits = output
        if top_k_index.shape[-1] != 1:
            raise ValueError(
                f"{type(router).__name__} hands on one expert per token, got {top_k_index.shape[-1]} from `fn`."
            )
        chosen = F.one_hot(top_k_index, router.num_experts + 1)[..., :-1].to(mask.dtype).reshape(mask.shape)
        chosen = chosen * (chosen.cumsum(dim=-2) <= router.expert_capacity)
        return chosen, top_k_weights.to(weights.dtype).reshape(weights.shape), logits
