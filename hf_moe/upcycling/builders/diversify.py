"""Copies made different from each other: how EvoMoE's one expert becomes many (2112.14397, Sec. 3.1)."""

from dataclasses import dataclass, replace

import torch

from hf_moe.upcycling.exactness import Exactness

from .base import ExpertBuilder
from .copy import copies_exactness


__all__ = ["METHODS", "Diversify"]

METHODS = ("mask", "noise", "copy")


@dataclass(frozen=True)
class Diversify(ExpertBuilder):
    """EvoMoE's expert-diversify step: copies of one trained expert, each changed in its own way.

    `"mask"` draws a random share of the entries of every matrix anew from the distribution of initial weights;
    `"noise"` adds N(0, (sigma std(W))^2); `"copy"` leaves the copies equal. Biases are left alone.

    Note: how the released method changes the copies is not known (the code of that phase was not published); masks
    are our reading, rate and spread are our choice.

    Args:
        method (`str`, defaults to `"mask"`): `"mask"`, `"noise"` or `"copy"`.
        rate (`float`, defaults to 0.1): Share of the entries that `"mask"` draws anew.
        sigma (`float`, defaults to 0.01): Spread of `"noise"`, relative to that of a matrix.
        std (`float`, *optional*): Spread of what `"mask"` draws; `initializer_range` of the model by default.

    Example:

    ```python
    >>> moe, report = upcycle(dense, num_experts=4, top_k=1, experts=Diversify("mask", rate=0.1))
    ```
    """

    method: str = "mask"
    rate: float = 0.1
    sigma: float = 0.01
    std: float | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {self.method!r}.")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"`rate` must be between 0 and 1, got {self.rate}.")
        if not self.sigma >= 0:
            raise ValueError(f"`sigma` must not be negative, got {self.sigma}.")
        if self.std is not None and not self.std > 0:
            raise ValueError(f"`std` must be above 0, got {self.std}.")

    @property
    def is_silent(self) -> bool:
        """Whether the copies stay equal."""
        return {"mask": self.rate, "noise": self.sigma}.get(self.method, 0) == 0

    def prepare(self, model, sites):
        return self if self.std is not None else replace(self, std=getattr(model.config, "initializer_range", None))

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        if self.is_silent:
            return [ffn] * num_experts
        matrices = {name: t for name, t in ffn.tensors().items() if t.ndim == 2}
        return [
            replace(ffn, **{name: self.changed(tensor, generator) for name, tensor in matrices.items()})
            for _ in range(num_experts)
        ]

    def changed(self, matrix: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One matrix of one expert.

        Args:
            matrix (`torch.Tensor`): Of the expert there was.
            generator (`torch.Generator`, *optional*): CPU generator; the only source of randomness.

        Returns:
            `torch.Tensor` of the same shape and dtype, never the same memory.
        """
        if self.is_silent:
            return matrix.clone()
        noise = torch.randn(matrix.shape, generator=generator).to(matrix.device)
        if self.method == "noise":
            return (matrix.float() + self.sigma * matrix.float().std() * noise).to(matrix.dtype)
        redrawn = (torch.rand(matrix.shape, generator=generator) < self.rate).to(matrix.device)
        return torch.where(redrawn, ((self.std or 0.02) * noise).to(matrix.dtype), matrix)

    def exactness(self, rule, top_k, num_experts, router=None):
        same = copies_exactness(rule, top_k, num_experts)
        if self.is_silent:
            return same
        if self.method == "noise":
            reason = f"noise of {self.sigma:g} standard deviations was added to the experts"
        else:
            reason = f"{self.rate:.0%} of the weights of every expert were drawn anew"
        return Exactness(False, reason, same.scale)
