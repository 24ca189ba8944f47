"""Copies with Gaussian noise on a random part of the weights (the comparison of Drop-Upcycling, 2502.19261)."""

from dataclasses import dataclass, replace

import torch

from hf_moe.upcycling.exactness import Exactness

from .base import ExpertBuilder
from .copy import copies_exactness


__all__ = ["Noise"]


@dataclass(frozen=True)
class Noise(ExpertBuilder):
    """W + m * n with n ~ N(0, sigma^2) and m = 1 on a random share `fraction` of the entries, drawn anew for every
    expert and every matrix. Biases are left alone.

    Args:
        sigma (`float`, defaults to 0.02): Standard deviation.
        fraction (`float`, defaults to 0.5): Share of entries that get noise.
    """

    sigma: float = 0.02
    fraction: float = 0.5

    def __post_init__(self):
        if self.sigma < 0:
            raise ValueError(f"`sigma` must not be negative, got {self.sigma}.")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"`fraction` must be between 0 and 1, got {self.fraction}.")

    @property
    def is_silent(self) -> bool:
        """No noise at all."""
        return self.sigma == 0 or self.fraction == 0

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        if self.is_silent:
            return [ffn] * num_experts
        matrices = {name: t for name, t in ffn.tensors().items() if t.ndim == 2}
        return [
            replace(ffn, **{name: self._noisy(tensor, generator) for name, tensor in matrices.items()})
            for _ in range(num_experts)
        ]

    def _noisy(self, tensor: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        noise = self.sigma * torch.randn(tensor.shape, generator=generator)
        if self.fraction < 1:
            noise = noise * (torch.rand(tensor.shape, generator=generator) < self.fraction)
        return (tensor.float() + noise.to(tensor.device)).to(tensor.dtype)

    def exactness(self, rule, top_k, num_experts, router=None):
        same = copies_exactness(rule, top_k, num_experts)
        if self.is_silent:
            return same
        return Exactness(False, f"noise of standard deviation {self.sigma:g} was added to the experts", same.scale)
