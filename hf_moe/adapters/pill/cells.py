"""The two cells: the improved adapter and the gate on a modality's values."""

import torch
from torch import nn

from hf_moe.adapters.core import Bottleneck


__all__ = ["HeadGate", "improved_adapter"]


def improved_adapter(width: int, rank: int, init_weights: bool = True) -> Bottleneck:
    """A(u) = W_up(SiLU(W_gate u) * W_down u), without biases; a plain bottleneck is what the authors improve on.

    W_down starts as N(0, 0.02), W_up as zeros, so the result starts as zeros.

    Args:
        width (`int`): Of `u` and of the result.
        rank (`int`): Of the bottleneck.
        init_weights (`bool`, defaults to `True`): `False` draws W_up too.

    Returns:
        [`~hf_moe.adapters.core.Bottleneck`]

    Example:
        ```python
        improved_adapter(576, 32)(torch.randn(2, 7, 576))  # zeros
        ```
    """
    cell = Bottleneck(width, width, rank, activation="silu", gated=True, bias=False, init_weights=init_weights)
    with torch.no_grad():
        nn.init.normal_(cell.down.weight, std=0.02 if init_weights else 0.2)
    return cell


class HeadGate(nn.Module):
    """g = tanh(W_g x), one number per token and head; W_g starts as zeros, so the gate starts closed.

    Args:
        width (`int`): Of `x`.
        heads (`int`): Number of heads of the values.
        init_weights (`bool`, defaults to `True`): `False` draws W_g.

    Example:
        ```python
        HeadGate(576, 3)(torch.randn(2, 7, 576))  # zeros, (2, 7, 3)
        ```
    """

    def __init__(self, width: int, heads: int, init_weights: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width))
        with torch.no_grad():
            nn.init.zeros_(self.weight) if init_weights else nn.init.normal_(self.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The gate.

        Args:
            x (`torch.Tensor` of shape `(..., width)`): What the value projection reads.

        Returns:
            `torch.Tensor` of shape `(..., heads)`: From -1 to 1.
        """
        return torch.tanh(nn.functional.linear(x, self.weight))
