"""Ternary experts in use: bytes of packed weights, unpacked expert by expert where tokens were routed to.

Shapes: T tokens, D hidden, I intermediate, N experts, K per token.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_moe.experts.stacked import sort_slots
from hf_moe.experts.ternary_rounding import round_activations, ternary_codes

from .packing import pack, packed_rows, unpack


__all__ = ["PackedTernaryExperts"]


class PackedTernaryExperts(nn.Module):
    """What [`~hf_moe.experts.TernaryExperts`] becomes at export. No parameters: nothing in it can be trained.

    Buffers: `gate_up_packed` uint8 `(N, 2, ceil(I / 4), D)`, `gate_up_scale` `(N, 2, 1, 1)` (or `(N, 2, I, 1)` with a
    scale per row), `down_packed` `(N, ceil(D / 4), I)`, `down_scale` `(N, 1, 1)`. Scales are the bits of float32
    numbers in int32, so that they stay exact when the model is cast or loaded in another type.

    Args:
        config: The model's config, as for the bank.
        packing (`str`): A key of `PACKINGS`.
        scale (`str`): `"matrix"` or `"row"`.
        activation_bits (`int`, *optional*): As in training.
        num_experts, hidden_size, intermediate_size (`int`): Sizes.
    """

    gate_up_packed: torch.Tensor
    gate_up_scale: torch.Tensor
    down_packed: torch.Tensor
    down_scale: torch.Tensor

    def __init__(
        self,
        config: Any,
        packing: str,
        scale: str,
        activation_bits: int | None,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
    ):
        super().__init__()
        self.config = config
        self.packing, self.weight_scale, self.activation_bits = packing, scale, activation_bits
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, intermediate_size
        self.act_fn = ACT2FN[config.expert_activation]
        n, d, i = num_experts, hidden_size, intermediate_size
        up_rows, down_rows = (i, d) if scale == "row" else (1, 1)
        up = torch.zeros(n, 2, packed_rows(i, packing), d, dtype=torch.uint8)
        down = torch.zeros(n, packed_rows(d, packing), i, dtype=torch.uint8)
        self.register_buffer("gate_up_packed", up)
        self.register_buffer("down_packed", down)
        self.register_buffer("gate_up_scale", torch.zeros(n, 2, up_rows, 1, dtype=torch.int32))
        self.register_buffer("down_scale", torch.zeros(n, down_rows, 1, dtype=torch.int32))

    @classmethod
    def like(cls, bank: Any, packing: str) -> "PackedTernaryExperts":
        """An empty module of the sizes of a [`~hf_moe.experts.TernaryExperts`]."""
        sizes = (bank.num_experts, bank.hidden_dim, bank.intermediate_dim)
        return cls(bank.config, packing, bank.weight_scale, bank.activation_bits, *sizes)

    @classmethod
    def from_bank(cls, bank: Any, packing: str) -> "PackedTernaryExperts":
        """Rounds and packs the parameters of `bank`, expert by expert."""
        packed = cls.like(bank, packing).to(bank.down_proj.device)
        for e in range(bank.num_experts):
            matrices = {"gate_up": bank.gate_up_proj[e].unflatten(0, (2, -1)), "down": bank.down_proj[e]}
            for name, matrix in matrices.items():
                codes, scale = ternary_codes(matrix, bank.weight_scale)
                packed.get_buffer(f"{name}_packed")[e] = pack(codes, packing)
                packed.get_buffer(f"{name}_scale")[e] = scale.view(torch.int32)
        return packed.train(bank.training)

    def expert(self, e: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices of one expert, `(2I, D)` and `(D, I)`."""
        up = self.gate_up_scale[e].view(torch.float32) * unpack(
            self.gate_up_packed[e], self.intermediate_dim, self.packing
        )
        down = self.down_scale[e].view(torch.float32) * unpack(self.down_packed[e], self.hidden_dim, self.packing)
        return up.flatten(0, 1).to(dtype), down.to(dtype)

    def latent(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Parameters, in float32, that round to this expert again: with W = s Q / mean |Q| both s and Q come back,
        with W = s Q only Q would."""
        matrices = []
        for scale, packed, rows in (
            (self.gate_up_scale[e], self.gate_up_packed[e], self.intermediate_dim),
            (self.down_scale[e], self.down_packed[e], self.hidden_dim),
        ):
            codes = unpack(packed, rows, self.packing).float()
            axes = (-2, -1) if self.weight_scale == "matrix" else (-1,)
            filled = codes.abs().mean(dim=axes, keepdim=True)
            matrices.append(scale.view(torch.float32) * codes / filled.clamp(min=1e-30))
        return matrices[0].flatten(0, 1), matrices[1]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As every bank: y_t = sum over the slots of t of w * E_e(x_t); empty slots cost nothing.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens.
            top_k_index (`torch.Tensor` of shape `(T, K)`): Experts; N marks an empty slot.
            top_k_weights (`torch.Tensor` of shape `(T, K)`): Weights, 0 on empty slots.

        Returns:
            `torch.Tensor` of shape `(T, D)`.
        """
        token, order, ends = sort_slots(top_k_index, self.num_experts)
        weight = top_k_weights.reshape(-1)[order]
        tokens = round_activations(hidden_states, self.activation_bits)
        output, start = torch.zeros_like(hidden_states), 0
        for e, end in enumerate(ends):
            if end > start:
                rows = token[start:end]
                up, down = self.expert(e, hidden_states.dtype)
                gate, state = F.linear(tokens[rows], up).chunk(2, dim=-1)
                state = round_activations(self.act_fn(gate) * state, self.activation_bits)
                state = F.linear(state, down) * weight[start:end, None]
                output = output.index_add(0, rows, state.to(output.dtype))
            start = end
        return output

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"{sizes}, packing={self.packing!r}"
