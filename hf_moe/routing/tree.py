"""Differentiable gates that become sparse by themselves: COMET's trees and DSelect-k's binary codes.

Both are products of smooth steps, which are exactly 0 or 1 outside of a narrow band: experts with weight 0 are left
out without any gradient being lost.

Shapes: T tokens, D hidden, N experts (all, zero-computation ones included), J trees or selectors
(`num_experts_per_tok`).
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .output import RouterOutput, RoutingContext
from .registry import register_router
from .schedules import parse_schedules
from .variable import VariableRouter


__all__ = ["CometRouter", "DSelectKRouter", "leaf_order", "smooth_step"]

#: Starts of the released code: nodes within gamma / 100, leaf scores within 0.05.
NODE_START, SCORE_START = 0.01, 0.05


def smooth_step(t: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """0 up to -gamma/2, 1 from gamma/2 on, and the cubic -2 t^3 / gamma^3 + 3 t / (2 gamma) + 1/2 in between.

    The derivative is 0 at both ends and outside (DSelect-k, 2106.03760, Eq. 2).

    Example:

    ```python
    >>> smooth_step(torch.tensor([-1.0, 0.0, 0.25]))
    tensor([0.0000, 0.5000, 0.8438])
    ```
    """
    u = (t / gamma + 0.5).clamp(0, 1)
    return u * u * (3 - 2 * u)  # the same cubic, without cancellation near 0


def leaf_order(num_leaves: int) -> list[int]:
    """Nodes that are leaves of a tree in heap order (children of i: 2i + 1, 2i + 2), from left to right.

    Example:

    ```python
    >>> leaf_order(5)
    [7, 8, 4, 5, 6]
    ```
    """
    deepest = 2 ** math.ceil(math.log2(num_leaves)) - 1 if num_leaves > 1 else 0
    leaves = range(num_leaves - 1, 2 * num_leaves - 1)
    # Leaves lie on two levels at most, and a heap fills the deeper one from the left.
    return sorted(leaves, key=lambda node: (node < deepest, node))


class _SmoothStepRouter(VariableRouter):
    """What both gates share: weights g computed for all experts, entropies in the loss, zeros left out.

    `router_logits` are g: there are no logits that a softmax makes g of, other than log g, which rounding spoils where
    a step is nearly 0 or 1. A router z-loss means nothing here.
    """

    has_trees = True

    entropy_coef: torch.Tensor

    def __init__(self, config: Any, layer_idx: int, *, gamma: float = 1.0, entropy_coef: float = 0.1, **kwargs):
        super().__init__(config, layer_idx, **kwargs)
        self.penalized = self.has_penalty(**config.router_config)
        self.num_trees = config.num_experts_per_tok
        self.gamma = float(gamma)
        self.initial_entropy_coef = float(entropy_coef)
        self.register_buffer("entropy_coef", torch.tensor(self.initial_entropy_coef))
        self.node_weight = nn.Parameter(torch.empty(self.num_trees * self.num_nodes, self.hidden_size))
        self.node_bias = nn.Parameter(torch.empty(self.num_trees * self.num_nodes))
        self.score_weight = nn.Parameter(torch.empty(self.num_trees * self.num_scores, self.hidden_size))
        self.score_bias = nn.Parameter(torch.empty(self.num_trees * self.num_scores))
        self.reset_parameters()

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        if not 0 < options.get("gamma", 1.0) < float("inf"):
            raise ValueError(f"`router_config['gamma']` must be above 0 and finite, got {options['gamma']}.")
        if not 0 <= options.get("entropy_coef", 0.1) < float("inf"):
            raise ValueError(
                f"`router_config['entropy_coef']` must be at least 0 and finite, got {options['entropy_coef']}."
            )
        schedule = parse_schedules(options.get("schedules") or {}).get("entropy_coef")
        if schedule is not None and schedule.lowest() < 0:
            raise ValueError(f"the schedule of `entropy_coef` reaches {schedule.lowest()}, but must not be negative.")
        if config.num_routing_targets < 2:
            raise ValueError(f"`router_type={cls.router_type!r}` needs at least 2 experts to choose from.")

    @classmethod
    def has_penalty(cls, **options) -> bool:
        own = options.get("entropy_coef", 0.1) > 0 or "entropy_coef" in (options.get("schedules") or {})
        return own or super().has_penalty(**options)

    @property
    def num_nodes(self) -> int:
        """Smooth steps of one tree or selector."""
        raise TypeError(f"{type(self).__name__} must define `num_nodes`.")

    @property
    def num_scores(self) -> int:
        """Mixing scores of one tree or selector."""
        raise TypeError(f"{type(self).__name__} must define `num_scores`.")

    def gate(self, steps: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each tree or selector adds to the weights of the experts, and its leaves.

        Args:
            steps (`torch.Tensor` of shape `(T, J, num_nodes)`): Values of the smooth steps.
            scores (`torch.Tensor` of shape `(T, J, num_scores)`): Mixing scores.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Parts of g and the leaves, both `(T, J, N)`.
        """
        raise TypeError(f"{type(self).__name__} must define `gate`.")

    def regularizer(self, leaves: torch.Tensor) -> torch.Tensor:
        """Sum over trees and leaves of -v log v, `(T,)`, times its coefficient: 0 where every step is 0 or 1."""
        entropy = -(leaves * torch.log(leaves + 1e-6)).sum(dim=(-2, -1))
        return self.entropy_coef.float() * entropy

    def compute_gate(
        self, hidden_states: torch.Tensor, soft: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """g `(T, N)` and leaves `(T, J, N)` of hidden states `(T, D)`; `soft` is P while a permutation search runs."""
        hidden_states = hidden_states.float()
        nodes = F.linear(hidden_states, self.node_weight.float(), self.node_bias.float())
        scores = F.linear(hidden_states, self.score_weight.float(), self.score_bias.float())
        steps = smooth_step(nodes.unflatten(-1, (self.num_trees, self.num_nodes)), self.gamma)
        parts, leaves = self.gate(steps, scores.unflatten(-1, (self.num_trees, self.num_scores)))
        if self.permutation is not None:
            parts = self.permutation.permute(parts, soft)
        return parts.sum(dim=-2), leaves

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        return router_logits

    def keep(self, sorted_scores: torch.Tensor) -> torch.Tensor:
        return sorted_scores > 0

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext | None = None) -> RouterOutput:
        # A pipeline of its own: the regulariser is on the leaves, of which g is only the sum.
        context = context if context is not None else RoutingContext()
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            soft = self.soft_permutation()
            g, leaves = self.compute_gate(hidden_states, soft)
            with torch.no_grad():
                index = self.select(g)  # (T, K)
            index, weights = self.post_process(index, self.weigh(g, index), context)
            penalty = self.regularizer(leaves) if self.training and self.penalized else None
            if penalty is not None and soft is not None and self.permutation is not None:
                penalty = penalty + self.permutation.penalty(soft)
        return RouterOutput(g, weights.to(hidden_states.dtype), index, None, penalty)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "score_bias"):
            init.constant_(self.entropy_coef, self.initial_entropy_coef)
            for parameter in (self.node_weight, self.node_bias):
                init.uniform_(parameter, -NODE_START * self.gamma, NODE_START * self.gamma)
            for parameter in (self.score_weight, self.score_bias):
                init.uniform_(parameter, -SCORE_START, SCORE_START)


@register_router("comet")
class CometRouter(_SmoothStepRouter):
    """`num_experts_per_tok` binary trees whose leaves are the experts; smooth steps in their nodes say left or right.

    [COMET](https://huggingface.co/papers/2306.02824), Sec. 3. With v_lj the product of the steps on the way to leaf l
    of tree j and a_lj a linear score, g_l = sum_j v_lj exp(a_lj) / sum_l'j' v_l'j' exp(a_l'j'). Once every step is 0
    or 1, each tree has one leaf and a token at most `num_experts_per_tok` experts; before that it has more, and
    training costs as much. The entropy of the leaves, times `entropy_coef`, drives steps to 0 and 1. `temperature` has
    no effect.

    Note: experts are left out where g is exactly 0, which loses no gradient; the released code also treats v below
    1e-5 as 0. The paper searches for gamma and the entropy's weight on every data set; these are middle values.

    Args:
        gamma (`float`, defaults to 1.0): Width of the smooth step; steps freeze outside of it.
        entropy_coef (`float`, defaults to 0.1): Weight of the entropy in the training loss, kept in a 0-dim buffer
            that a schedule may write.
        max_experts (`int`, *optional*): The most experts a token may get; N by default, which is exact.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(router_type="comet", router_config={"gamma": 0.1})
    ```
    """

    def __init__(self, config: Any, layer_idx: int, **kwargs):
        super().__init__(config, layer_idx, **kwargs)
        # Positions in heap order of the leaves from left to right.
        self.leaf_position = [node - self.num_nodes for node in leaf_order(self.num_experts)]

    @property
    def num_nodes(self) -> int:
        return self.num_experts - 1

    @property
    def num_scores(self) -> int:
        return self.num_experts

    def gate(self, steps: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaves = self.leaves(steps)  # (T, J, N)
        # exp(a) relative to the largest score with v > 0; what the clamp changes has v = 0.
        top = scores.detach().masked_fill(leaves.detach() <= 0, -torch.inf).amax(dim=(-2, -1), keepdim=True)
        weighted = leaves * (scores - top).clamp(max=0).exp()
        return weighted / weighted.sum(dim=(-2, -1), keepdim=True), leaves

    def leaves(self, steps: torch.Tensor) -> torch.Tensor:
        """v, the probabilities of the leaves from left to right, `(T, J, N)`, from the probabilities of going left."""
        level, first, found = torch.ones_like(steps[..., :1]), 0, []
        while level.shape[-1]:
            inner = min(max(self.num_nodes - first, 0), level.shape[-1])  # nodes of this level that have children
            found.append(level[..., inner:])
            left = steps[..., first : first + inner]
            first += level.shape[-1]
            level = level[..., :inner].unsqueeze(-1) * torch.stack([left, 1 - left], dim=-1)
            level = level.flatten(-2)
        return torch.cat(found, dim=-1)[..., self.leaf_position]


@register_router("dselect_k")
class DSelectKRouter(_SmoothStepRouter):
    """`num_experts_per_tok` selectors that spell an expert's number in bits, each bit a smooth step.

    [DSelect-k](https://huggingface.co/papers/2106.03760), Sec. 3. Selector j gives expert i the weight r_ji = the
    product over bits (most significant first) of s_jb or 1 - s_jb; g = sum_j softmax(w)_j r_j with linear scores w.
    The entropy of the r_j, times `entropy_coef`, drives bits to 0 and 1. `temperature` has no effect.

    Note: where N is no power of two, some codes belong to no expert; their share of g is missing, and
    `validity_coef` * sum_j 1 / sum_i r_ji keeps it small. Its size is not published.

    Args:
        gamma (`float`, defaults to 1.0): Width of the smooth step.
        entropy_coef (`float`, defaults to 0.1): Weight of the entropy in the training loss, kept in a 0-dim buffer
            that a schedule may write.
        validity_coef (`float`, defaults to 0.01): Weight of the penalty on codes without an expert.
        max_experts (`int`, *optional*): The most experts a token may get; N by default, which is exact.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(router_type="dselect_k", num_experts=16, num_experts_per_tok=2)
    ```
    """

    def __init__(self, config: Any, layer_idx: int, *, validity_coef: float = 0.01, **kwargs):
        super().__init__(config, layer_idx, **kwargs)
        self.validity_coef = validity_coef

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        if not 0 <= options.get("validity_coef", 0.01) < float("inf"):
            raise ValueError(
                f"`router_config['validity_coef']` must be at least 0 and finite, got {options['validity_coef']}."
            )

    @classmethod
    def has_penalty(cls, **options) -> bool:
        return super().has_penalty(**options) or options.get("validity_coef", 0.01) > 0

    @property
    def num_nodes(self) -> int:
        return math.ceil(math.log2(self.num_experts))

    @property
    def num_scores(self) -> int:
        return 1

    def gate(self, steps: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.ones_like(steps[..., :1])
        for bit in steps.unbind(dim=-1):
            bit = bit.unsqueeze(-1)
            codes = torch.stack([codes * (1 - bit), codes * bit], dim=-1).flatten(-2)  # (T, J, 2^bits so far)
        leaves = codes[..., : self.num_experts]
        mixture = torch.softmax(scores, dim=-2)  # (T, J, 1), over selectors
        return mixture * leaves, leaves

    def regularizer(self, leaves: torch.Tensor) -> torch.Tensor:
        penalty = super().regularizer(leaves)
        if self.validity_coef and self.num_experts != 2**self.num_nodes:
            penalty = penalty + self.validity_coef * (1 / (leaves.sum(dim=-1) + 1e-6)).sum(dim=-1)
        return penalty
