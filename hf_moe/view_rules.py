"""How a family's router turns logits into experts and weights, as data that can be read, ranked and rewritten.

Shapes: T tokens, N experts, K per token.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch


__all__ = ["FamilyRule", "Routing"]


class Routing(NamedTuple):
    """What one router call decided, one row per token.

    Args:
        router_logits (`torch.Tensor` of shape `(T, N)`): Scores before softmax or sigmoid.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Mixing weights.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts; `N` on an empty slot (our routers, and rows
            that [`~hf_moe.routing_override`] padded).
    """

    router_logits: torch.Tensor
    top_k_weights: torch.Tensor
    top_k_index: torch.Tensor


@dataclass(frozen=True)
class FamilyRule:
    """Where a router class keeps what, and the steps from its logits to its weights: score, choose, weigh.

    Args:
        score (`str`): `"softmax"`, `"sigmoid"`, `"none"` (the router returns probabilities already), or
            `"router.<attribute>"`, where the attribute holds a function or one of these names.
        router_logits (`int`, defaults to 0): Position of the logits in the tuple the router returns.
        top_k_weights (`int`, defaults to 1): Position of the mixing weights.
        top_k_index (`int`, defaults to 2): Position of the chosen experts.
        top_k (`str`, defaults to `"top_k"`): Attribute of the router, dots allowed, that says how many are chosen.
        choose_by (`str`, defaults to `"scores"`): `"scores"` or `"logits"`: what the experts are ranked by.
        bias (`str`, *optional*): Attribute of the router that is added for the choice alone, or `"argument"` where
            it is the second argument of the router's `forward`.
        groups (`str`, *optional*): Only experts of the best groups can be chosen; a group is as good as its best
            expert (`"max"`) or its two best together (`"top2"`). The router has `num_group` and `topk_group`.
        group_fill (`float`, defaults to `-inf`): What the other experts' choice scores are set to.
        normalise (`str`, defaults to `"never"`): Whether the weights of the chosen are divided by their sum:
            `"never"`, `"always"`, `"norm_topk_prob"` (if that attribute of the router is true), or `"softmax"`: they
            are the softmax of the chosen logits.
        epsilon (`float`, defaults to 0.0): Added to that sum.
        floor (`str`, *optional*): Attribute of the router that the sum is at least.
        scale (`str`, *optional*): Attribute of the router that multiplies the weights.
        ordered (`bool`, defaults to `True`): Whether slots come best first, as opposed to in no order.
        float32_scores (`bool`, defaults to `True`): Whether scores are float32 whatever the logits are.

    Example:
        ```python
        FAMILY_RULES["MyTopKRouter"] = FamilyRule(
            score="sigmoid", normalise="always", router_logits=2, top_k_weights=0, top_k_index=1
        )
        ```
    """

    score: str
    router_logits: int = 0
    top_k_weights: int = 1
    top_k_index: int = 2
    top_k: str = "top_k"
    choose_by: str = "scores"
    bias: str | None = None
    groups: str | None = None
    group_fill: float = -torch.inf
    normalise: str = "never"
    epsilon: float = 0.0
    floor: str | None = None
    scale: str | None = None
    ordered: bool = True
    float32_scores: bool = True

    # -- the router's output ---------------------------------------------------------------------------------------
    def read(self, router: Any, output: Any) -> Routing:
        """The decision in what the router returned, one row per token."""
        tensors = (output[position] for position in (self.router_logits, self.top_k_weights, self.top_k_index))
        return Routing(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors))

    def write(self, router: Any, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        """What the router would have returned with other weights and experts, both `(T, K')`."""
        new = {self.top_k_weights: top_k_weights, self.top_k_index: top_k_index}
        return tuple(
            new[i].to(value.dtype).reshape(*value.shape[:-1], -1) if i in new else value
            for i, value in enumerate(output)
        )

    # -- sizes -----------------------------------------------------------------------------------------------------
    def num_experts(self, router: Any) -> int:
        """N, as the router counts: experts that compute nothing are among them."""
        return router.num_experts

    def idle_experts(self, router: Any) -> tuple[str, ...]:
        """Names of the last of these experts, those without a feed-forward."""
        return ()

    def num_experts_per_tok(self, router: Any) -> int:
        """K."""
        return attrgetter(self.top_k)(router)

    def max_slots(self, router: Any) -> int | None:
        """The most experts per token that `write` can hand on; `None` where there is no limit."""
        return None

    # -- from logits to weights --------------------------------------------------------------------------------------
    def score_function(self, router: Any) -> str:
        """Name of the function that makes scores of logits."""
        if not self.score.startswith("router."):
            return self.score
        value = getattr(router, self.score.removeprefix("router."))
        return value if isinstance(value, str) else type(value).__name__.removesuffix("Activation").lower()

    def normalisation(self, router: Any) -> str:
        """`"none"`, `"sum"` or `"softmax"`: what makes weights of the scores of the chosen."""
        if self.normalise == "softmax":
            return "softmax"
        divides = self.normalise == "always" or (self.normalise == "norm_topk_prob" and router.norm_topk_prob)
        return "sum" if divides else "none"

    def scores(self, router: Any, router_logits: torch.Tensor) -> torch.Tensor:
        """Logits -> scores, both `(T, N)`."""
        name: Any = self.score
        if name.startswith("router."):
            name = getattr(router, name.removeprefix("router."))
        if self.float32_scores:
            router_logits = router_logits.float()
        if name == "softmax":
            return router_logits.softmax(dim=-1)
        if name == "sigmoid":
            return router_logits.sigmoid()
        return router_logits if name == "none" else name(router_logits)

    def probabilities(self, router: Any, router_logits: torch.Tensor) -> torch.Tensor:
        """The scores as a distribution over the experts, float32, before any bias."""
        scores = self.scores(router, router_logits.float()).float()
        if self.score_function(router) in ("softmax", "none"):
            return scores
        return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

    def choice_scores(
        self, router: Any, scores: torch.Tensor, router_logits: torch.Tensor, args: tuple, kwargs: dict
    ) -> torch.Tensor:
        """What the experts are ranked by, `(T, N)`: bias and group limits are in it.

        Args:
            router (`nn.Module`): The router.
            scores (`torch.Tensor` of shape `(T, N)`): See `scores`.
            router_logits (`torch.Tensor` of shape `(T, N)`): See [`Routing`].
            args, kwargs: What the router was called with: some are told their bias.
        """
        choice = router_logits if self.choose_by == "logits" else scores
        if self.bias is not None:
            bias = self._bias(args, kwargs) if self.bias == "argument" else attrgetter(self.bias)(router)
            choice = choice if bias is None else choice + bias.to(choice.device)
        if self.groups is not None and getattr(router, "topk_method", None) != "greedy" and router.num_group:
            choice = self._limit_to_groups(router, choice)
        return choice

    def weigh(
        self,
        router: Any,
        scores: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        args: tuple = (),
        tokens: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mixing weights of the experts in `top_k_index`, both `(T, K')`.

        Args:
            router (`nn.Module`): The router.
            scores (`torch.Tensor` of shape `(T, N)`): See `scores`.
            router_logits (`torch.Tensor` of shape `(T, N)`): See [`Routing`].
            top_k_index (`torch.Tensor` of shape `(T, K')`): The experts, no empty slots.
            args (`tuple`): What the router was called with.
            tokens (`slice` or `torch.Tensor` of shape `(T,)`, *optional*): Positions of these tokens in that call.
        """
        normalisation = self.normalisation(router)
        if normalisation == "softmax":
            weights = self.softmax_of_chosen(router_logits.gather(-1, top_k_index))
        else:
            weights = scores.gather(-1, top_k_index)
        if normalisation == "sum":
            total = weights.sum(dim=-1, keepdim=True)
            total = total + self.epsilon if self.epsilon else total
            weights = weights / (total if self.floor is None else total.clamp(min=getattr(router, self.floor)))
        return weights if self.scale is None else weights * getattr(router, self.scale)

    def softmax_of_chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """Weights of the experts with these logits, both `(T, K')`."""
        return logits.softmax(dim=-1)

    # -- parts -------------------------------------------------------------------------------------------------------
    def _bias(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        return args[1] if len(args) > 1 else next((value for name, value in kwargs.items() if "bias" in name), None)

    def _limit_to_groups(self, router: Any, choice: torch.Tensor) -> torch.Tensor:
        grouped = choice.unflatten(-1, (router.num_group, -1))  # (T, groups, N / groups)
        best = grouped.topk(1 if self.groups == "max" else 2, dim=-1).values.sum(-1)  # (T, groups)
        kept = best.topk(router.topk_group, dim=-1, sorted=False).indices
        eligible = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
        return grouped.masked_fill(~eligible.unsqueeze(-1), self.group_fill).flatten(-2)
