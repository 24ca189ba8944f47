"""The bottleneck: down, activation, up, scale; the cell most adapters are made of."""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN


__all__ = ["Bottleneck"]


class Bottleneck(nn.Module):
    """`scale * U act(D x + b) + c`, or with `gated` `scale * U (act(G x) * D x)`.

    Shapes: D_in the width of `x`, D_out of the result, R the bottleneck.

    Args:
        in_features (`int`): D_in.
        out_features (`int`): D_out.
        rank (`int`): R.
        activation (`str`, defaults to `"gelu"`): A name of transformers' activations.
        gated (`bool`, defaults to `False`): Gated linear unit, where the activation acts on a projection of its own.
        bias (`bool`, defaults to `True`): Whether `D` and `U` have biases; the gate never has one.
        dropout (`float`, defaults to 0.0): Before `U`.
        layernorm (`bool`, defaults to `False`): A layer norm of its own before `D`.
        scale (`float`, defaults to 1.0): Factor of the result.
        init_weights (`bool`, defaults to `True`): `U` and its bias start at zero, so the result does; `False` draws
            them.

    Example:
        ```python
        Bottleneck(768, 768, rank=64)(hidden_states)  # zeros, until it is trained
        ```
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        layernorm: bool = False,
        scale: float = 1.0,
        init_weights: bool = True,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(in_features, eps=1e-6) if layernorm else None
        self.down = nn.Linear(in_features, rank, bias=bias)
        self.gate = nn.Linear(in_features, rank, bias=False) if gated else None
        self.up = nn.Linear(rank, out_features, bias=bias)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draws `D` (and `G`), zeroes `U`, all in place: the weights may be on the meta device.

        Args:
            init_weights (`bool`, defaults to `True`): `False` draws `U` and the biases too.
        """
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        if self.gate is not None:
            nn.init.kaiming_uniform_(self.gate.weight, a=math.sqrt(5))
        for linear in (self.down, self.up):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias) if init_weights else nn.init.normal_(linear.bias, std=0.1)
        nn.init.zeros_(self.up.weight) if init_weights else nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the bottleneck.

        Args:
            x (`torch.Tensor` of shape `(..., D_in)`): The input.

        Returns:
            `torch.Tensor` of shape `(..., D_out)`.
        """
        if self.norm is not None:
            x = self.norm(x)
        hidden = self.down(x)  # (..., R)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        result = self.up(self.dropout(hidden))  # (..., D_out)
        return result if self.scale == 1.0 else result * self.scale
