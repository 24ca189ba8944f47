"""From a number to a vector: Fourier features with fixed frequencies, and sines and cosines of positions."""

import math
from collections.abc import Callable

import torch
from torch import nn


__all__ = ["FourierFeatures", "ScaleEncoder", "sinusoid"]


def sinusoid(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Sines, then cosines, of `positions` at `size / 2` frequencies between 1 and 1/10000.

    Args:
        positions (`torch.Tensor` of shape `(N,)`): Numbers.
        size (`int`): Width of the result; a zero is added when it is odd.

    Returns:
        `torch.Tensor` of shape `(N, size)`, float32.
    """
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / max(half, 1)
    angles = positions.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)  # (N, size / 2)
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, size % 2))


class FourierFeatures(nn.Module):
    """`cos(2 pi (f s w + p))` with fixed `f ~ N(0, 1)` and `p ~ U[0, 1)`, always computed in float32.

    The frequencies are saved with the adapter: an adapter with others is another function. Rounding them to bfloat16
    would move the features by up to 2, so they stay float32 whatever dtype the model is cast to.

    Args:
        size (`int`): Number of features h.
        multiplier (`float`, defaults to 1.0): Factor s of the input.
    """

    frequencies: torch.Tensor
    phases: torch.Tensor

    def __init__(self, size: int, multiplier: float = 1.0):
        super().__init__()
        self.multiplier = multiplier
        self.register_buffer("frequencies", torch.empty(size, dtype=torch.float32))
        self.register_buffer("phases", torch.empty(size, dtype=torch.float32))
        nn.init.normal_(self.frequencies)
        nn.init.uniform_(self.phases)

    def _apply(self, fn: Callable, recurse: bool = True) -> "FourierFeatures":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        """The features of each scale.

        Args:
            scale (`torch.Tensor` of shape `(B,)`): Scales w.

        Returns:
            `torch.Tensor` of shape `(B, h)`, float32.
        """
        turns = self.frequencies * (scale.float() * self.multiplier)[:, None] + self.phases  # (B, h)
        return torch.cos(2 * torch.pi * turns)


class ScaleEncoder(nn.Module):
    """`LayerNorm(MLP(Fourier(w)))` with the widths h, 4h, h.

    Args:
        size (`int`): Width h.
        multiplier (`float`): See [`FourierFeatures`].
        dropout (`float`, *optional*): Of the network of the offset architecture, which also has a layer norm between
            its two layers; the cross-attention's encoder (`None`) has neither.
    """

    def __init__(self, size: int, multiplier: float, dropout: float | None = None):
        super().__init__()
        self.features = FourierFeatures(size, multiplier)
        self.mlp = two_layers(size, 4 * size, size, dropout)
        self.norm = nn.LayerNorm(size)

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        """Encodes scales.

        Args:
            scale (`torch.Tensor` of shape `(B,)`): Scales w.

        Returns:
            `torch.Tensor` of shape `(B, h)`, in the dtype of the weights.
        """
        return self.norm(self.mlp(self.features(scale).to(self.norm.weight.dtype)))


def two_layers(in_size: int, hidden: int, out_size: int, dropout: float | None = None) -> nn.Sequential:
    """Linear, ReLU, linear; with a `dropout` (also 0.0) dropout and layer norm between, and dropout after."""
    first, last = nn.Linear(in_size, hidden), nn.Linear(hidden, out_size)
    for linear in (first, last):
        nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(2))
        nn.init.zeros_(linear.bias)
    if dropout is None:
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(hidden), last, nn.Dropout(dropout))
