"""Capacity: an expert takes only its first `C` assignments; the rest become empty slots.

Shapes: T tokens, N experts, K per token.
"""

import torch


__all__ = ["CAPACITY_POLICIES", "apply_capacity", "pack_slots", "trim_slots"]

CAPACITY_POLICIES = ("order", "score", "random")


def apply_capacity(
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    capacity: torch.Tensor,
    policy: str = "order",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empties the slots of over-full experts (GShard 2006.16668; batch priority 2106.05974; random token selection
    2207.04672).

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts; `N` marks a slot that is already empty.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.
        capacity (`torch.Tensor` of shape `(N,)`): Assignments each expert takes. Not rounded: rank r stays if r < C.
        policy (`str`, defaults to `"order"`): Who stays: `"order"`, every token's first choice before any second
            choice and earlier tokens first; `"score"`, the heaviest weights; `"random"`, a random subset.

    Returns:
        `top_k_index, top_k_weights` of the same shapes, active slots first.

    Raises:
        ValueError: unknown `policy`.
    """
    if policy not in CAPACITY_POLICIES:
        raise ValueError(f"`policy` must be one of {CAPACITY_POLICIES}, got {policy!r}.")
    num_experts = capacity.shape[0]
    tokens, slots = top_k_index.shape
    expert = top_k_index.T.reshape(-1)  # (K*T,) slot-major: all first choices come before all second choices
    if policy == "order":
        order = torch.argsort(expert, stable=True)
    else:
        weights = top_k_weights.detach().float().T.reshape(-1)
        priority = weights if policy == "score" else torch.rand_like(weights)
        by_priority = torch.argsort(priority, descending=True, stable=True)
        order = by_priority[torch.argsort(expert[by_priority], stable=True)]
    sorted_expert = expert[order]
    start = torch.searchsorted(sorted_expert, torch.arange(num_experts + 1, device=expert.device))  # (N+1,)
    rank_sorted = torch.arange(expert.numel(), device=expert.device) - start[sorted_expert]
    rank = torch.empty_like(rank_sorted).scatter(0, order, rank_sorted)
    limit = torch.cat([capacity.float(), capacity.new_zeros(1).float()])  # empty slots stay empty
    keep = (rank < limit[expert]).reshape(slots, tokens).T  # (T, K)
    return pack_slots(top_k_index, top_k_weights, keep, num_experts)


def pack_slots(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor, keep: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns slots with `keep == False` into empty ones and moves active slots first, heaviest first.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.
        keep (`torch.Tensor` of shape `(T, K)`): Boolean.
        num_experts (`int`): N, the index that marks an empty slot.

    Returns:
        `top_k_index, top_k_weights` of shape `(T, K)`.
    """
    top_k_weights = torch.where(keep, top_k_weights, torch.zeros_like(top_k_weights))
    top_k_index = torch.where(keep, top_k_index, torch.full_like(top_k_index, num_experts))
    if top_k_index.shape[-1] == 1:
        return top_k_index, top_k_weights
    key = torch.where(keep, top_k_weights.detach().float(), torch.full_like(top_k_weights, -torch.inf).float())
    order = torch.argsort(key, dim=-1, descending=True, stable=True)
    return top_k_index.gather(-1, order), top_k_weights.gather(-1, order)


def trim_slots(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts off the last slots where every token's are empty: what experts gather follows the batch, not the limit.

    On a GPU this waits for the device once. Compiled code and CUDA graphs keep all slots, their shapes being static.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts; N marks an empty slot.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.
        num_experts (`int`): N.

    Returns:
        `top_k_index, top_k_weights` of shape `(T, K')`, K' at least 1.

    Example:

    ```python
    >>> trim_slots(torch.tensor([[0, 4, 4], [1, 2, 4]]), torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]), 4)[0]
    tensor([[0, 4],
            [1, 2]])
    ```
    """
    slots = top_k_index.shape[-1]
    static = torch.compiler.is_compiling() or top_k_index.device.type == "meta"
    static = static or (top_k_index.is_cuda and torch.cuda.is_current_stream_capturing())
    if static or slots == 1 or not top_k_index.shape[0]:
        return top_k_index, top_k_weights
    in_use = (top_k_index < num_experts).any(dim=0)  # (K,)
    last = int((in_use * torch.arange(1, slots + 1, device=in_use.device)).max())
    return top_k_index[:, : max(last, 1)], top_k_weights[:, : max(last, 1)]
