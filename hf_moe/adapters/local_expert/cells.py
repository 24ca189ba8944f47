"""The local expert and its gate.

Shapes: f (..., D) the head's input, z (..., C) logits, q (..., Q) what the gate reads.
"""

import torch
from torch import nn

from hf_moe.adapters.core import Bottleneck, Float32Buffers


__all__ = ["GateCell", "LinearExpert", "LowRankResidual", "MlpExpert", "ResidualExpert"]


class ResidualExpert(nn.Module):
    """z_L = z_G + W f + b, zero at the start."""

    def __init__(self, in_features: int, out_features: int, bias: bool, init_weights: bool):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        with torch.no_grad():
            for parameter in self.parameters():
                nn.init.zeros_(parameter) if init_weights else nn.init.normal_(parameter, std=0.5)

    def forward(self, f: torch.Tensor, z_global: torch.Tensor) -> torch.Tensor:
        """The local expert's logits `(..., C)`."""
        return z_global + self.linear(f)

    def delta(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a head that always answers like this expert has more than `head`: weight and bias."""
        return self.linear.weight, self.linear.bias


class LowRankResidual(nn.Module):
    """z_L = z_G + U D f + b with a product of rank r: the size can stay a few per cent of a small classifier."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, init_weights: bool):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)
        with torch.no_grad():
            for parameter in self.up.parameters():
                nn.init.zeros_(parameter) if init_weights else nn.init.normal_(parameter, std=0.5)

    def forward(self, f: torch.Tensor, z_global: torch.Tensor) -> torch.Tensor:
        """The local expert's logits `(..., C)`."""
        return z_global + self.up(self.down(f))

    def delta(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See [`ResidualExpert.delta`]."""
        return self.up.weight @ self.down.weight, self.up.bias


class LinearExpert(nn.Module):
    """z_L = W f + b, a copy of the head at the start."""

    def __init__(self, head: nn.Module, bias: bool, init_weights: bool):
        super().__init__()
        out_features, in_features = head.weight.shape
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if init_weights and parameter.device.type != "meta":
                    parameter.copy_(getattr(head, name.rpartition(".")[2]))
                elif not init_weights:
                    nn.init.normal_(parameter, std=0.5)

    def forward(self, f: torch.Tensor, z_global: torch.Tensor) -> torch.Tensor:
        """The local expert's logits `(..., C)`."""
        return self.linear(f)

    def delta(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See [`ResidualExpert.delta`]."""
        weight, bias = self.linear.weight, self.linear.bias
        return weight - head.weight.to(weight.dtype), None if bias is None else bias - head.bias.to(bias.dtype)


class MlpExpert(nn.Module):
    """z_L = U gelu(D f + d) + u, on its own from the start."""

    def __init__(self, in_features: int, out_features: int, hidden: int):
        super().__init__()
        self.network = Bottleneck(in_features, out_features, hidden, init_weights=False)

    def forward(self, f: torch.Tensor, z_global: torch.Tensor) -> torch.Tensor:
        """The local expert's logits `(..., C)`."""
        return self.network(f)


class GateCell(Float32Buffers):
    """s = v q + c, or through a hidden layer; `threshold` says from which sigmoid(s) on the local expert answers."""

    float32_buffers = ("threshold",)

    def __init__(self, in_features: int, hidden: int | None, threshold: float, init_weights: bool):
        super().__init__()
        if hidden is None:
            self.network: nn.Module = nn.Linear(in_features, 1)
            last = self.network
        else:
            last = nn.Linear(hidden, 1)
            self.network = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), last)
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        with torch.no_grad():
            for parameter in last.parameters():
                nn.init.zeros_(parameter) if init_weights else nn.init.normal_(parameter, std=0.1)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """The gate's logit `(..., 1)`, float32."""
        return self.network(q).float()
