"""One MoE layer of a model: its parts, and its router's steps under one name in every family.

Shapes: T tokens, N experts, K per token.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .view_rules import FamilyRule, Routing


__all__ = ["MoeLayerView"]


@dataclass(frozen=True)
class MoeLayerView:
    """One MoE layer.

    Args:
        name (`str`): Path of the block in the model below any wrapper, such as `"model.layers.3.mlp"`.
        index (`int`): Position among the MoE layers, from 0.
        block (`nn.Module`): The module that owns router and experts.
        router (`nn.Module`): Its router.
        experts (`nn.Module`): Its stacked experts.
        num_experts (`int`): N.
        num_experts_per_tok (`int`): K.
        rule ([`FamilyRule`], *optional*): How to read the router's output; `None` for our own routers.

    Example:
        ```python
        view = moe_layers(model)[0]
        routing = view.read(view.router(hidden_states))
        view.probabilities(routing.router_logits)  # (T, N)
        ```
    """

    name: str
    index: int
    block: Any = field(repr=False)
    router: Any = field(repr=False)
    experts: Any = field(repr=False)
    num_experts: int
    num_experts_per_tok: int
    rule: FamilyRule | None = None

    @property
    def score_function(self) -> str:
        """What makes scores of logits: `"softmax"`, `"sigmoid"`, or the name of the router's own function."""
        if self.rule is not None:
            return self.rule.score_function(self.router)
        return getattr(type(self.router), "router_type", "") or type(self.router).__name__

    @property
    def normalisation(self) -> str:
        """What makes weights of the chosen scores: `"none"`, `"sum"`, `"softmax"` (of the chosen logits), or words."""
        if self.rule is not None:
            return self.rule.normalisation(self.router)
        return "sum" if self.router.norm_topk_prob else "none"

    @property
    def top_k_source(self) -> str:
        """Where the number of experts per token is read from at every call: an attribute of the router."""
        return "top_k" if self.rule is None else self.rule.top_k

    @property
    def num_computing_experts(self) -> int:
        """Experts with a feed-forward. Those without, such as MoE++'s zero-computation experts, come after them."""
        return self.num_experts - len(self._idle_experts)

    @property
    def expert_labels(self) -> list[str]:
        """A short name per expert: its number, or what an expert without a feed-forward does."""
        return [*(str(i) for i in range(self.num_computing_experts)), *self._idle_experts]

    @property
    def _idle_experts(self) -> tuple[str, ...]:
        if self.rule is not None:
            return self.rule.idle_experts(self.router)
        zero_experts = getattr(self.block, "zero_experts", None)
        if zero_experts is None:
            return ()
        kinds = ("constant", "copy", "zero")
        return tuple(f"{kind} {i}" for kind in kinds for i in range(getattr(zero_experts, f"num_{kind}")))

    def read(self, output: Any) -> Routing:
        """The decision in a value returned by `router`, flattened to one row per token.

        Args:
            output (`tuple`): What the router returned.

        Returns:
            [`Routing`]
        """
        if self.rule is not None:
            return self.rule.read(self.router, output)
        tensors = (output.router_logits, output.top_k_weights, output.top_k_index)
        return Routing(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors))

    def write(self, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        """A value as returned by `router`, with another decision in it.

        Args:
            output (`tuple`): What the router returned.
            top_k_weights (`torch.Tensor` of shape `(T, K')`): New weights.
            top_k_index (`torch.Tensor` of shape `(T, K')`): New experts.

        Returns:
            The tuple to hand to the block.
        """
        if self.rule is not None:
            return self.rule.write(self.router, output, top_k_weights, top_k_index)
        return output._replace(top_k_weights=top_k_weights, top_k_index=top_k_index)

    @property
    def max_slots(self) -> int | None:
        """The most experts per token that the block can take; `None` where there is no limit."""
        return None if self.rule is None else self.rule.max_slots(self.router)

    @property
    def ordered(self) -> bool:
        """Whether the router puts its best expert in the first slot."""
        return self.rule is None or self.rule.ordered

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Logits -> scores as the router makes them, both `(T, N)`."""
        return self.router.scores(router_logits) if self.rule is None else self.rule.scores(self.router, router_logits)

    def choice_scores(
        self, scores: torch.Tensor, router_logits: torch.Tensor, args: tuple = (), kwargs: dict | None = None
    ) -> torch.Tensor:
        """What the router ranks the experts by, without gradient: selection bias and group limits are in it.

        Args:
            scores (`torch.Tensor` of shape `(T, N)`): See `scores`.
            router_logits (`torch.Tensor` of shape `(T, N)`): As in [`Routing`].
            args, kwargs: What the router was called with: some families hand it its bias.

        Returns:
            `torch.Tensor` of shape `(T, N)`.
        """
        with torch.no_grad():
            if self.rule is None:
                return self.router.choice_scores(scores, router_logits)
            return self.rule.choice_scores(self.router, scores, router_logits, args, kwargs or {})

    def weigh(
        self,
        scores: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        args: tuple = (),
        tokens: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights the router would give to these experts.

        Args:
            scores (`torch.Tensor` of shape `(T, N)`): See `scores`.
            router_logits (`torch.Tensor` of shape `(T, N)`): As in [`Routing`].
            top_k_index (`torch.Tensor` of shape `(T, K')`): The experts, no empty slots.
            args (`tuple`): What the router was called with.
            tokens (`slice` or `torch.Tensor` of shape `(T,)`, *optional*): Positions of these tokens in that call.

        Returns:
            `torch.Tensor` of shape `(T, K')`.
        """
        if self.rule is None:
            return self.router.weigh(scores, top_k_index)
        return self.rule.weigh(self.router, scores, router_logits, top_k_index, args, tokens)

    def probabilities(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Distribution over the experts before any selection bias, float32, rows summing to 1.

        Args:
            router_logits (`torch.Tensor` of shape `(T, N)`): As in [`Routing`].

        Returns:
            `torch.Tensor` of shape `(T, N)`.
        """
        if self.rule is None:
            return self.router.probabilities(router_logits.float())
        return self.rule.probabilities(self.router, router_logits)
