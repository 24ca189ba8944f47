"""Balancing without a loss: a bias per expert that only enters the choice, moved against the load.

Shapes: L MoE layers, N experts.
"""

from collections.abc import Iterable

import torch
from torch import nn


__all__ = ["update_selection_bias"]


@torch.no_grad()
def update_selection_bias(routers: Iterable[nn.Module], counts: torch.Tensor, speed: float) -> None:
    """b_i <- b_i + speed * sign(target_i - c_i), in place, once per optimizer step.

    [Auxiliary-loss-free load balancing](https://huggingface.co/papers/2408.15664), Alg. 1, as used by
    [DeepSeek-V3](https://huggingface.co/papers/2412.19437), Sec. 2.1.2. The target is the mean load. Where a router
    has `balance_weights` eta (MoE++), it is proportional to 1/eta instead: the loads at which eta_i f_i, what the
    heterogeneous loss pushes on, is the same for all experts.

    Args:
        routers (`Iterable[nn.Module]`): One per row of `counts`; those without `e_score_correction_bias` are skipped.
        counts (`torch.Tensor` of shape `(L, N)`): Assignments of the whole step, all ranks. Rows may be padded.
        speed (`float`): Step size; 0.001 in both papers.

    Raises:
        ValueError: there are not as many routers as rows.

    Example:

    ```python
    >>> update_selection_bias([router], torch.tensor([[7, 1, 4, 4]]), speed=0.001)
    >>> router.e_score_correction_bias
    tensor([-0.0010,  0.0010,  0.0000,  0.0000])
    ```
    """
    routers = list(routers)
    if len(routers) != counts.shape[0]:
        raise ValueError(
            f"`routers` has {len(routers)} entries and `counts` {counts.shape[0]} rows; pass one router per MoE layer."
        )
    for router, row in zip(routers, counts, strict=True):
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is None:
            continue
        load = row[: bias.numel()].to(bias.device, torch.float32)
        weights = getattr(router, "balance_weights", None)
        if weights is None:
            target = load.sum() / load.numel()
        else:
            share = 1 / weights.to(load)
            target = load.sum() * share / share.sum()
        bias += speed * torch.sign(target - load)
