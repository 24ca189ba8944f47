"""What is added to the output of an attention block, as a function of guidance scale and conditions.

Shapes: B batch, S tokens of the block, C keys (conditions), d width of the block, h width of the encoders.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .config import AgdConfig
from .encoders import ScaleEncoder, sinusoid, two_layers


__all__ = ["AgdCell", "CrossAttentionCell", "OffsetCell"]


class AgdCell(nn.Module):
    """Base of both architectures: an encoder of the scale and a projection of each other condition to h.

    Args:
        config ([`AgdConfig`]): Resolved: `condition_on` and `condition_sizes` are known.
        in_size (`int`): Width of the block's input.
        out_size (`int`): Width of the block's output.
        dropout (`float`, *optional*): See [`ScaleEncoder`].
    """

    def __init__(self, config: AgdConfig, in_size: int, out_size: int, dropout: float | None):
        super().__init__()
        sizes, names = config.condition_sizes or {}, (config.condition_on or ())[1:]
        self.scale = ScaleEncoder(config.hidden_size, config.scale_multiplier, dropout)
        self.project = nn.ModuleDict({name: nn.Linear(sizes[name], config.hidden_size) for name in names})
        self.range = config.guidance_range
        modules = config.condition_modules or {}
        self.sources = {name: modules.get(name) for name in names}
        if config.timestep_embedding == "sinusoid" and "timestep" in self.sources:
            self.sources["timestep"] = None
        for linear in self.project.values():
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(2))  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(linear.bias)  # pyright: ignore[reportArgumentType]

    def start(self, output: nn.Linear, config: AgdConfig) -> None:
        """Sets the last layer: zero, or as drawn; with `init_weights=False` its bias is drawn too."""
        if not config.init_weights:
            nn.init.normal_(output.weight, std=0.2)
            nn.init.normal_(output.bias, std=0.2)
        elif config.zero_init:
            nn.init.zeros_(output.weight)

    def keys(self, scale: torch.Tensor, conditions: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The encoded conditions, each `(B or 1, number of tokens, h)`."""
        encoded = [self.scale(scale)[:, None]]
        for name, linear in self.project.items():
            value = conditions[name].to(encoded[0].dtype)
            encoded.append(linear(value if value.ndim == 3 else value[:, None]))
        return encoded

    def constant(self, scale: torch.Tensor) -> torch.Tensor:
        """What is added to each token when only the scale counts, `(B, d)`."""
        raise TypeError(f"{type(self).__name__} must override `constant`.")


class OffsetCell(AgdCell):
    """`A = MLP(Enc(w) + P_t temb + P_y yemb + P_c mean(prompt))`, the same vector for all tokens.

    Args:
        config ([`AgdConfig`]): Resolved.
        in_size (`int`): Width of the block's input; without effect.
        out_size (`int`): Width d of the block's output.
    """

    def __init__(self, config: AgdConfig, in_size: int, out_size: int):
        super().__init__(config, in_size, out_size, config.dropout)
        self.mlp = two_layers(config.hidden_size, config.hidden_size, out_size, config.dropout)
        self.start(self.mlp[4], config)  # pyright: ignore[reportArgumentType]

    def forward(self, x: torch.Tensor, scale: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """What to add to the block's output.

        Args:
            x (`torch.Tensor` of shape `(B, S, d)` or `(B, d)`): The block's input; only its number of axes counts.
            scale (`torch.Tensor` of shape `(B,)` or `(1,)`): Guidance scales w.
            conditions (`dict[str, torch.Tensor]`): The others by name.

        Returns:
            `torch.Tensor` of shape `(B or 1, 1, d)` or `(B or 1, d)`.
        """
        encoded = self.scale(scale)  # (B, h)
        for name, linear in self.project.items():
            value = conditions[name].to(encoded.dtype)
            encoded = encoded + linear(value if value.ndim == 2 else value.mean(1))
        added = self.mlp(encoded)  # (B, d)
        return added.reshape(len(added), *[1] * (x.ndim - 2), -1)

    def constant(self, scale: torch.Tensor) -> torch.Tensor:
        """See [`AgdCell.constant`]."""
        return self.mlp(self.scale(scale))


class CrossAttentionCell(AgdCell):
    """`W_o softmax(Q K' / sqrt(h)) V`: queries from the block's input, keys and values from the conditions.

    The divisor is `sqrt(h)` for several heads too. Positions of the keys are coded by sines and cosines.

    Args:
        config ([`AgdConfig`]): Resolved.
        in_size (`int`): Width of the block's input.
        out_size (`int`): Width d of the block's output.
    """

    def __init__(self, config: AgdConfig, in_size: int, out_size: int):
        super().__init__(config, in_size, out_size, None)
        size = config.hidden_size
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.query = nn.Linear(in_size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, out_size)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.output.bias)
        self.start(self.output, config)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """What to add to the block's output.

        Args:
            x (`torch.Tensor` of shape `(B, S, d)` or `(B, d)`): The block's input.
            scale (`torch.Tensor` of shape `(B,)` or `(1,)`): Guidance scales w.
            conditions (`dict[str, torch.Tensor]`): The others by name.

        Returns:
            `torch.Tensor` of the shape of the block's output.
        """
        tokens = x if x.ndim == 3 else x[:, None]  # (B, S, d)
        keys = torch.cat([key.expand(len(x), -1, -1) for key in self.keys(scale, conditions)], dim=1)  # (B, C, h)
        keys = keys + self._positions(keys)
        heads = [self._split(part) for part in (self.query(tokens), self.key(keys), self.value(keys))]
        attended = F.scaled_dot_product_attention(
            *heads, dropout_p=self.dropout if self.training else 0.0, scale=self.key.out_features**-0.5
        )  # (B, heads, S, h / heads)
        added = self.output(attended.transpose(1, 2).flatten(2))  # (B, S, d)
        return added if x.ndim == 3 else added[:, 0]

    def constant(self, scale: torch.Tensor) -> torch.Tensor:
        """See [`AgdCell.constant`]: the softmax over one key is 1."""
        key = self.scale(scale)[:, None]
        return self.output(self.value(key + self._positions(key)))[:, 0]

    def _positions(self, keys: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(keys.shape[1], device=keys.device)
        return sinusoid(positions, keys.shape[2]).to(keys.dtype)

    def _split(self, part: torch.Tensor) -> torch.Tensor:
        return part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
