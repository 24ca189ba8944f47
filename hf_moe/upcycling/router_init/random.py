"""Router starts that need no data: random rows, random rows repeated, zeros."""

from dataclasses import dataclass

import torch

from .base import RouterInit


__all__ = ["Normal", "Repeated", "Zeros"]


@dataclass(frozen=True)
class Normal(RouterInit):
    """N(0, std^2), as sparse upcycling does.

    Args:
        std (`float`, defaults to 0.02): Standard deviation.
    """

    std: float = 0.02

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(
                f"`std` must be above 0, got {self.std}: equal rows send every token to the same experts."
            )

    def build(self, num_experts, hidden_size, stats=None, generator=None, layer_idx=0):
        return self.std * torch.randn(num_experts, hidden_size, generator=generator)


@dataclass(frozen=True)
class Repeated(RouterInit):
    """N / G random rows, each G times in a row: the start of virtual groups (2410.07524).

    Args:
        groups (`int`): G.
        std (`float`, defaults to 0.02): Standard deviation.
    """

    groups: int = 1
    std: float = 0.02

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"`groups` must be at least 1, got {self.groups}.")
        if not self.std > 0:
            raise ValueError(
                f"`std` must be above 0, got {self.std}: equal rows send every token to the same experts."
            )

    def validate(self, num_experts, top_k):
        if num_experts % self.groups:
            raise ValueError(
                f"`num_experts` must be a multiple of the `groups` ({self.groups}) of Repeated, got {num_experts}."
            )

    def build(self, num_experts, hidden_size, stats=None, generator=None, layer_idx=0):
        rows = self.std * torch.randn(num_experts // self.groups, hidden_size, generator=generator)
        return rows.repeat_interleave(self.groups, dim=0)


@dataclass(frozen=True)
class Zeros(RouterInit):
    """All zero, allowed only where every expert is active: with ties, top-k sends all tokens to the same K experts,
    the others never train (Mixtral with K = 2 of 4: always the same two)."""

    uniform = True

    def validate(self, num_experts, top_k):
        if top_k < num_experts:
            raise ValueError(
                f"`router=Zeros()` makes all {num_experts} logits equal, and ties send every token to the same "
                f"{top_k} experts, so the others never train. Use Normal(0.02), or `top_k={num_experts}`."
            )

    def build(self, num_experts, hidden_size, stats=None, generator=None, layer_idx=0):
        return torch.zeros(num_experts, hidden_size)
