"""Which experts an override sends a token to, and their weights.

Shapes: T tokens, N experts, K' slots per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .view_layer import MoeLayerView
from .view_rules import Routing


__all__ = ["Selector", "make_selector", "rank_experts"]


@dataclass(frozen=True)
class Selector:
    """One way to choose, called with what one router call decided.

    Args:
        ranks (`tuple[int]`, *optional*), random (`int`, *optional*), threshold (`float`, *optional*),
        fn (`Callable`, *optional*), generator (`torch.Generator`, *optional*):
            See [`~hf_moe.routing_override`]; `top_m` has become `ranks`.
    """

    ranks: tuple[int, ...] | None = None
    random: int | None = None
    threshold: float | None = None
    fn: Callable | None = None
    generator: torch.Generator | None = None

    @property
    def leaves_slots_empty(self) -> bool:
        """Whether tokens can differ in how many slots they use."""
        return self.threshold is not None or self.fn is not None

    def __call__(
        self, view: MoeLayerView, routing: Routing, args: tuple, kwargs: dict, tokens: slice | torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses and weighs.

        Args:
            view ([`MoeLayerView`]): The layer.
            routing ([`Routing`]): What its router decided for the `T` tokens in question.
            args, kwargs: What the router was called with.
            tokens (`slice` or `torch.Tensor` of shape `(T,)`, *optional*): Their positions among those the router saw.

        Returns:
            Weights and experts, `(T, K')`; `N` with weight 0 on an empty slot.
        """
        logits = routing.router_logits
        scores = view.scores(logits)
        if self.random is not None:
            draw = torch.rand(scores.shape, generator=self.generator, device=_device(self.generator, scores))
            index = draw.to(scores.device).topk(self.random, dim=-1).indices
            return view.weigh(scores, logits, index, args, tokens), index
        if self.threshold is not None:
            return self._above_threshold(view, routing, scores, args, tokens)
        choice = view.choice_scores(scores, logits, args, kwargs)
        if self.fn is not None:
            return _checked(self.fn(view, routing, choice), view, logits)
        ranks = self.ranks or ()
        order = rank_experts(choice, scores, max(ranks) + 1, view.num_experts_per_tok, view.ordered)
        if len(ranks) == 1:
            index = order[:, ranks[0] : ranks[0] + 1]
        else:
            index = order if ranks == tuple(range(len(ranks))) else order[:, list(ranks)]
        return view.weigh(scores, logits, index, args, tokens), index

    def _above_threshold(
        self,
        view: MoeLayerView,
        routing: Routing,
        scores: torch.Tensor,
        args: tuple,
        tokens: slice | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, probabilities = routing.router_logits, view.probabilities(routing.router_logits)
        threshold = self.threshold or 0.0
        # Probabilities sum to 1, so no more than 1 / threshold of them reach it; rounding may add one.
        slots = min(int(1 / threshold) + 1, scores.shape[-1], view.max_slots or scores.shape[-1])
        values, index = probabilities.topk(slots, dim=-1)
        active = values >= threshold  # (T, K'), a prefix
        active[:, 0] = True
        if not torch.compiler.is_compiling() and active.shape[0]:  # asks for a number: not for a compiled graph
            slots = int(active.sum(dim=-1).max())
            index, active = index[:, :slots], active[:, :slots]
        # The others do not count in a normalisation over the chosen.
        unchosen = torch.ones_like(scores, dtype=torch.bool).scatter(-1, index, ~active)
        weights = view.weigh(
            scores.masked_fill(unchosen, 0.0), logits.masked_fill(unchosen, -torch.inf), index, args, tokens
        )
        return weights.masked_fill(~active, 0.0), index.masked_fill(~active, view.num_experts)


def rank_experts(
    choice: torch.Tensor, scores: torch.Tensor, depth: int, native_depth: int, ordered: bool = True
) -> torch.Tensor:
    """The `depth` best experts of each token.

    Args:
        choice (`torch.Tensor` of shape `(T, N)`): What the router chooses by.
        scores (`torch.Tensor` of shape `(T, N)`): Decides among experts that the choice does not tell apart, such as
            those of groups that were left out.
        depth (`int`): How many.
        native_depth (`int`): How many the router chooses.
        ordered (`bool`, defaults to `True`): Whether the router asks for its own in order.

    Returns:
        `torch.Tensor` of shape `(T, depth)`; best first, but as the router has them where these are its own.
    """
    if depth == native_depth and not ordered:
        return choice.topk(depth, dim=-1, sorted=False).indices
    if depth <= native_depth:
        return choice.topk(depth, dim=-1).indices
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_choice = choice.gather(-1, by_score).argsort(dim=-1, descending=True, stable=True)
    return by_score.gather(-1, by_choice)[:, :depth]


def make_selector(
    views: list[MoeLayerView],
    *,
    ranks: Sequence[int] | None,
    top_m: int | None,
    random: int | None,
    threshold: float | None,
    fn: Callable | None,
    generator: torch.Generator | None,
) -> Selector:
    """Checks the arguments of [`~hf_moe.routing_override`] against the layers.

    Raises:
        ValueError: see there.
    """
    given = {"ranks": ranks, "top_m": top_m, "random": random, "threshold": threshold, "fn": fn}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"Give exactly one of `ranks`, `top_m`, `random`, `threshold` and `fn`, got {names or 'none of them'}."
        )
    if generator is not None and random is None:
        raise ValueError("`generator` is for `random` alone: the other selections draw nothing. Leave it out.")
    smallest = min(views, key=lambda view: view.num_experts)
    if ranks is not None:
        ranks = tuple(_integer("ranks", rank) for rank in ranks)
        if not ranks:
            raise ValueError("`ranks` must name at least one expert by its place from 0, got none.")
        if len(set(ranks)) < len(ranks):
            raise ValueError(f"`ranks` must be different from each other, got {list(ranks)}.")
        _check_range("ranks", ranks, 0, smallest.num_experts - 1, smallest)
        _check_slots("ranks", len(ranks), views)
        return Selector(ranks=ranks)
    for name, count in (("top_m", top_m), ("random", random)):
        if count is not None:
            count = _integer(name, count)
            _check_range(name, (count,), 1, smallest.num_experts, smallest)
            _check_slots(name, count, views)
            return (
                Selector(ranks=tuple(range(count))) if name == "top_m" else Selector(random=count, generator=generator)
            )
    if threshold is not None:
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` is a probability and must lie between 0 and 1, got {threshold}.")
        return Selector(threshold=float(threshold))
    if not callable(fn):
        raise ValueError(f"`fn` must be a function of (view, routing, scores), got {type(fn).__name__}.")
    return Selector(fn=fn)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must be made of integers, got {value!r}.")
    return value


def _check_range(name: str, values: Sequence[int], low: int, high: int, view: MoeLayerView) -> None:
    if not all(low <= value <= high for value in values):
        raise ValueError(
            f"`{name}` must be between {low} and {high}: {view.name} has {view.num_experts} experts. Got "
            f"{list(values) if name == 'ranks' else values[0]}."
        )


def _check_slots(name: str, slots: int, views: list[MoeLayerView]) -> None:
    for view in views:
        if view.max_slots is not None and slots > view.max_slots:
            raise ValueError(
                f"`{name}` asks for {slots} experts per token, but {type(view.router).__name__} can hand on no more "
                f"than {view.max_slots}."
            )


def _device(generator: torch.Generator | None, like: torch.Tensor) -> torch.device:
    return like.device if generator is None else generator.device


def _checked(result: Any, view: MoeLayerView, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(f"`fn` must return the tuple (weights, index), got {type(result).__name__}.")
    weights, index = result
    if weights.shape != index.shape or weights.dim() != 2 or weights.shape[0] != logits.shape[0]:
        raise ValueError(
            f"`fn` must return weights and index of one shape, ({logits.shape[0]}, slots), got {tuple(weights.shape)} "
            f"and {tuple(index.shape)} at {view.name}."
        )
    return weights, index.long()
