"""Rows of routing decisions -> [`~hf_moe.routing.RouterStats`], which owns the formulas.

Shapes: T tokens, L MoE layers, N experts, K per token.
"""

from collections.abc import Iterator

import numpy as np
import torch

from hf_moe.routing.layer_routing import LayerRouting
from hf_moe.routing.statistics import RouterStats, RoutingSummary


__all__ = ["marginal_entropy", "summarize_assignments", "summarize_probabilities"]

# Rows that become tensors at once.
CHUNK = 4096


def summarize_assignments(top_k_index, num_experts: int | None) -> RoutingSummary:
    """Counts, load and balance of the experts that tokens were sent to; the probability fields are 0.

    Args:
        top_k_index (nested sequence of shape `(T, K)` or `(T, L, K)`): Chosen experts; `num_experts` is an empty slot.
        num_experts (`int`): N, which cannot be read off the indices: the last expert may be dead.

    Returns:
        [`~hf_moe.routing.statistics.RoutingSummary`]

    Raises:
        ValueError: `num_experts` is missing or smaller than an index.

    Example:
        ```python
        summarize_assignments([[0, 1], [0, 2]], num_experts=4).max_violation  # tensor([1.])
        ```
    """
    if num_experts is None:
        raise ValueError(
            "`num_experts` is missing: experts that never occur in `top_k_index` must be known to exist. Pass it to "
            "the metric, `ExpertLoad(num_experts=8)`, or to `compute(num_experts=8)`."
        )
    stats = RouterStats()
    for rows in _chunks(top_k_index, torch.int64):  # (T, L, K)
        if not 0 <= int(rows.min()) <= int(rows.max()) <= num_experts:
            raise ValueError(
                f"`top_k_index` holds {int(rows.min())} to {int(rows.max())}, but `num_experts` is {num_experts}: "
                f"experts are 0 to {num_experts - 1}, and {num_experts} marks an empty slot."
            )
        nothing = torch.zeros(1, 1).expand(rows.shape[0], num_experts)
        stats.update(LayerRouting(nothing, index, nothing) for index in rows.unbind(1))
    return stats.compute()


def summarize_probabilities(probabilities) -> RoutingSummary:
    """Entropies of the router's distributions; the fields about assignments are 0.

    Args:
        probabilities (nested sequence of shape `(T, N)` or `(T, L, N)`): Rows sum to 1.

    Returns:
        [`~hf_moe.routing.statistics.RoutingSummary`]

    Raises:
        ValueError: rows are not distributions.

    Example:
        ```python
        summarize_probabilities([[0.5, 0.5], [1.0, 0.0]]).entropy  # tensor([0.3466]), half of ln 2
        ```
    """
    stats = RouterStats()
    for rows in _chunks(probabilities, torch.float64):  # (T, L, N)
        low, high = (bound.item() for bound in rows.sum(dim=-1).aminmax())
        if rows.min() < 0 or low < 1 - 1e-3 or high > 1 + 1e-3:
            raise ValueError(
                f"`probabilities` must be distributions, but rows sum to {low:.4g} to {high:.4g} and the smallest "
                f"entry is {rows.min().item():.4g}. Pass what `MoeLayerView.probabilities` returns, not logits."
            )
        nobody = torch.zeros(rows.shape[0], 0, dtype=torch.int64)
        stats.update(LayerRouting(p, nobody, p) for p in rows.unbind(1))
    return stats.compute()


def marginal_entropy(summary: RoutingSummary) -> torch.Tensor:
    """Entropy of the mean distribution of each layer, H(1/T sum_t p_t), in nats.

    Its distance to `summary.entropy`, the mean of H(p_t), is the mutual information of token and expert.

    Args:
        summary ([`~hf_moe.routing.statistics.RoutingSummary`]): From `RouterStats.compute`.

    Returns:
        `torch.Tensor` of shape `(L,)`.

    Example:
        ```python
        gap = marginal_entropy(summary) - summary.entropy
        ```
    """
    return torch.special.entr(summary.mean_probability).sum(dim=-1)


def _chunks(rows, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Rows as tensors `(T, L, ...)`; L = 1 where the rows have no layer dimension."""
    for start in range(0, len(rows), CHUNK):
        chunk = torch.as_tensor(np.asarray(rows[start : start + CHUNK])).to(dtype)
        yield chunk.unsqueeze(1) if chunk.dim() == 2 else chunk
