"""Routing of groups of tokens: classes, positions in a window.

Shapes: T tokens, N experts, K per token, P position bins, G groups.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from .token_classes import POSITION_BINS


__all__ = ["PositionCounts", "in_order", "loads_of", "total_variation", "weighted_shift"]


class PositionCounts:
    """How often each expert received tokens of each position bin, `counts` of shape `(P, N)`.

    Args:
        num_experts (`int`): N.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.counts = torch.zeros(len(POSITION_BINS), num_experts, dtype=torch.int64)

    def update(self, bins: torch.Tensor, top_k_index: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            bins (`torch.Tensor` of shape `(T,)`): From [`~hf_moe.reporting.token_classes.position_bin`]; no padding.
            top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts, N on empty slots.
        """
        keys = (bins.unsqueeze(-1) * self.num_experts + top_k_index)[top_k_index < self.num_experts]
        self.counts += torch.bincount(keys, minlength=self.counts.numel()).view_as(self.counts)


def in_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """The different names: known ones in their order, then the others by alphabet.

    Args:
        names (`Iterable[str]`): May repeat.
        known (`Sequence[str]`): Names with a place.

    Returns:
        `list[str]`
    """
    names = set(names)
    return [name for name in known if name in names] + sorted(names.difference(known))


def loads_of(names: Iterable[str], counts: torch.Tensor) -> dict[str, list[float]]:
    """Counts of groups as shares of each group's assignments.

    Args:
        names (`Iterable[str]`): G names.
        counts (`torch.Tensor` of shape `(G, N)`): Assignments.

    Returns:
        `dict[str, list[float]]`: Name to N shares that sum to 1, or to 0 where a group has no assignment.
    """
    loads = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return dict(zip(names, loads.tolist(), strict=True))


def total_variation(one: Sequence[float], other: Sequence[float]) -> float:
    """Half the sum of the absolute differences of two distributions: the share that must move to make them equal.

    Args:
        one (`Sequence[float]`): N shares.
        other (`Sequence[float]`): N shares.

    Returns:
        `float`: 0 (equal) to 1 (nothing in common).
    """
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def weighted_shift(loads: Mapping[str, Sequence[float]], sizes: Mapping[str, int], whole: Sequence[float]) -> float:
    """How far the groups are from the load of all tokens, on average over tokens: 0 where the group says nothing about
    the expert.

    Args:
        loads (`Mapping[str, Sequence[float]]`): Group to its N shares.
        sizes (`Mapping[str, int]`): Group to its number of tokens.
        whole (`Sequence[float]`): N shares of all tokens.

    Returns:
        `float`: 0 to 1.
    """
    total = sum(sizes.values())
    return sum(sizes[name] * total_variation(load, whole) for name, load in loads.items()) / max(total, 1)
