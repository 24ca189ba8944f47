"""Which rows go to which expert: sorted once, empty slots dropped, no one-hot.

Shapes: T tokens, K slots per token, N experts, S <= T * K slots in use.
"""

from typing import NamedTuple

import torch


__all__ = ["Dispatch", "Segment", "compact_dispatch"]

# Up to here a Python sort of the indices is quicker than the half dozen tensor operations it replaces.
_HOST_SLOTS = 64


class Segment(NamedTuple):
    """Rows `start:end` of the sorted slots belong to `expert`."""

    expert: int
    start: int
    end: int


class Dispatch(NamedTuple):
    """The slots in use, sorted by expert; within an expert in the order of the tokens.

    Args:
        segments (`list` of [`Segment`]): One per expert that was chosen, ascending.
        slots (`torch.Tensor` of shape `(S,)`): Flat slot (token * K + k) of each sorted row.
        tokens (`torch.Tensor` of shape `(S,)`): Token of each sorted row.
        rows (`torch.Tensor` of shape `(S,)`): Sorted row of each slot in use, in slot order.
        in_use (`torch.Tensor` of shape `(S,)`, *optional*): The slots in use, ascending; `None` if all are.
        offsets (`torch.Tensor` of shape `(T,)`): Where in `rows` each token begins.
    """

    segments: list[Segment]
    slots: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    in_use: torch.Tensor | None
    offsets: torch.Tensor

    @property
    def num_rows(self) -> int:
        """S."""
        return self.slots.shape[0]

    @property
    def max_rows(self) -> int:
        """Rows of the busiest expert."""
        return max((segment.end - segment.start for segment in self.segments), default=0)


def compact_dispatch(top_k_index: torch.Tensor, num_experts: int) -> Dispatch:
    """Sorts the slots by expert.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`): Expert of each slot; `num_experts` or more is an empty slot.
        num_experts (`int`): N.

    Returns:
        [`Dispatch`]

    Example:
        ```python
        >>> compact_dispatch(torch.tensor([[2, 0], [0, 3]]), num_experts=3).segments
        [Segment(expert=0, start=0, end=2), Segment(expert=2, start=2, end=3)]
        ```
    """
    tokens, slots_per_token = top_k_index.shape
    index = top_k_index.reshape(-1)
    if index.numel() <= _HOST_SLOTS:
        order, counts = _sort_on_host(index.tolist(), num_experts)
        order = torch.tensor(order, dtype=torch.int64)
    else:
        order = torch.sort(index, stable=True).indices
        counts = torch.bincount(index, minlength=num_experts)[:num_experts].tolist()
    segments = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            segments.append(Segment(expert, start, start + count))
            start += count
    order = order[:start]  # empty slots have the highest index: they are last
    rows = torch.empty(index.numel(), dtype=torch.int64).scatter_(0, order, torch.arange(start))
    in_use = None
    if start == index.numel():
        offsets = torch.arange(0, start, slots_per_token) if slots_per_token else torch.zeros(tokens).long()
    else:
        used = index < num_experts
        in_use = used.nonzero().squeeze(-1)
        rows = rows[in_use]
        per_token = used.view(tokens, slots_per_token).sum(dim=-1)
        offsets = per_token.cumsum(0) - per_token
    return Dispatch(segments, order, order // max(slots_per_token, 1), rows, in_use, offsets)


def _sort_on_host(index: list[int], num_experts: int) -> tuple[list[int], list[int]]:
    order = sorted(range(len(index)), key=index.__getitem__)
    counts = [0] * num_experts
    for expert in index:
        if expert < num_experts:
            counts[expert] += 1
    return order, counts
