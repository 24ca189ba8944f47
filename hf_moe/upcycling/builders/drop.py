"""Drop-Upcycling: copies in which part of the channels is drawn anew (2502.19261)."""

from dataclasses import dataclass, replace

import torch

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.feed_forward import DenseFeedForward

from .base import ExpertBuilder
from .copy import copies_exactness


__all__ = ["Drop"]


@dataclass(frozen=True)
class Drop(ExpertBuilder):
    """In every expert a random set S of floor(rho I) channels is replaced: rows S of W_g and W_u and columns S of W_d
    are drawn from N(m, s^2), with m and s the mean and standard deviation of the replaced part of that matrix
    (Drop-Upcycling, Sec. 3.2). The channels of every expert are permuted first, which alone changes nothing.

    Note: one common set S for the three matrices, as in the paper; its released code draws three different ones.

    Args:
        rho (`float`, defaults to 0.5): Share of channels drawn anew. 0 gives copies.
    """

    rho: float = 0.5

    def __post_init__(self):
        if not 0 <= self.rho <= 1:
            raise ValueError(f"`rho` must be between 0 and 1, got {self.rho}.")

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        return [self._expert(ffn, generator) for _ in range(num_experts)]

    def _expert(self, ffn: DenseFeedForward, generator: torch.Generator | None) -> DenseFeedForward:
        order = torch.randperm(ffn.intermediate_size, generator=generator)
        permuted = ffn.channels(order)
        # The order is random, so the first channels are a random set.
        dropped = int(self.rho * ffn.intermediate_size)
        if dropped == 0:
            return permuted
        redrawn = {
            name: _redraw(tensor, dropped, 1 if name == "down" else 0, generator)
            for name, tensor in permuted.tensors().items()
            if name != "down_bias"  # belongs to no channel
        }
        return replace(permuted, **redrawn)

    def exactness(self, rule, top_k, num_experts, router=None):
        same = copies_exactness(rule, top_k, num_experts)
        if self.rho == 0:
            return same
        return Exactness(False, f"{self.rho:.0%} of the channels of every expert were drawn anew", same.scale)


def _redraw(tensor: torch.Tensor, count: int, dim: int, generator: torch.Generator | None) -> torch.Tensor:
    tensor = tensor.clone()
    part = tensor.narrow(dim, 0, count)
    values = part.float()
    # A single value has no spread.
    std = values.std() if values.numel() > 1 else values.new_zeros(())
    noise = torch.randn(part.shape, generator=generator).to(tensor.device)
    part.copy_(values.mean() + std * noise)
    return tensor
