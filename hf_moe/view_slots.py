"""Empty slots: how tokens that use fewer slots than others share one `(T, K)` table with them.

The experts of transformers' own families know empty slots (index `N`) from expert parallelism alone: grouped_mm and
our implementations then skip them, batched_mm computes them all the same, and an eager loop may not know them. Where
they would not be skipped, a slot of weight 0 repeats an expert of the token: no other weights have to be read for it.

Shapes: T tokens, N experts, K per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from .view_layer import MoeLayerView
from .view_rules import Routing


__all__ = ["fill_slots", "replace_rows", "skips_empty_slots"]


@contextmanager
def skips_empty_slots(view: MoeLayerView) -> Iterator[None]:
    """Lets the experts of `view` skip slots with index `N` inside the block, where their implementation can.

    Args:
        view ([`MoeLayerView`]): The layer.

    Example:
        ```python
        with skips_empty_slots(view):
            view.experts(hidden_states, top_k_index, top_k_weights)
        ```
    """
    experts = view.experts
    before = getattr(experts, "_is_expert_parallel", None)
    if before is None or _is_parallel(view):
        yield
        return
    experts._is_expert_parallel = True
    try:
        yield
    finally:
        experts._is_expert_parallel = before


def fill_slots(
    view: MoeLayerView, routing: Routing, weights: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes empty slots what the experts of `view` can take, and leaves tokens out that the router left out.

    Args:
        view ([`MoeLayerView`]): The layer.
        routing ([`Routing`]): What its router decided.
        weights (`torch.Tensor` of shape `(T, K)`): Mixing weights.
        index (`torch.Tensor` of shape `(T, K)`): Experts, `N` and above on an empty slot.

    Returns:
        `(weights, index)` of the same shapes.
    """
    if view.rule is None:  # padding tokens of our models
        unused = (routing.top_k_index >= view.num_experts).all(dim=-1, keepdim=True)
        index = index.masked_fill(unused, view.num_experts)
    empty = index >= view.num_experts
    weights = weights.masked_fill(empty, 0.0)
    if _skipped(view):
        return weights, index.clamp(max=view.num_experts)
    repeated = index[:, :1].masked_fill(empty[:, :1], 0)
    return weights, torch.where(empty, repeated, index)


def replace_rows(
    view: MoeLayerView, native: Routing, tokens: slice | torch.Tensor, weights: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's decision with that of some tokens replaced; the fewer slots are padded.

    Args:
        view ([`MoeLayerView`]): The layer.
        native ([`Routing`]): Of all `T` tokens, `K` slots.
        tokens (`slice` or `torch.Tensor` of shape `(R,)`): Positions of the tokens to replace.
        weights (`torch.Tensor` of shape `(R, K')`): Their weights.
        index (`torch.Tensor` of shape `(R, K')`): Their experts.

    Returns:
        `(weights, index)` of shape `(T, max(K, K'))`.
    """
    slots = max(native.top_k_index.shape[-1], index.shape[-1])
    all_weights, all_index = _pad(view, native.top_k_weights, native.top_k_index, slots)
    weights, index = _pad(view, weights, index, slots)
    if isinstance(tokens, slice):
        return (
            torch.cat([all_weights[: tokens.start], weights, all_weights[tokens.stop :]]),
            torch.cat([all_index[: tokens.start], index, all_index[tokens.stop :]]),
        )
    return all_weights.index_copy(0, tokens, weights), all_index.index_copy(0, tokens, index)


def _pad(
    view: MoeLayerView, weights: torch.Tensor, index: torch.Tensor, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    missing = slots - index.shape[-1]
    if not missing:
        return weights, index
    if _skipped(view):
        index = F.pad(index, (0, missing), value=view.num_experts)
    else:
        index = torch.cat([index, index[:, :1].expand(-1, missing)], dim=-1)
    return F.pad(weights, (0, missing)), index


def _skipped(view: MoeLayerView) -> bool:
    """Whether the experts skip index `N`, and read nothing for it."""
    if view.rule is None:
        return True  # the convention of our own routers
    if not getattr(view.experts, "_is_expert_parallel", False) or _is_parallel(view):
        return False
    implementation = getattr(view.experts.config, "_experts_implementation", None) or "eager"
    return implementation == "grouped_mm" or implementation.startswith("hf_moe")


def _is_parallel(view: MoeLayerView) -> bool:
    # The flag is theirs then, and the exchange of tokens between devices knows no empty slots.
    return getattr(view.experts, "num_experts", view.num_experts) != view.num_experts
