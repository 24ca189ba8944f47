"""Ternary experts in training: full-precision parameters that every forward rounds to {-s, 0, s}.

Shapes: T tokens, D hidden, I intermediate, N experts, K per token.
"""

from typing import Any

import torch
from transformers.integrations import use_experts_implementation

from .registry import register_experts
from .stacked import StackedExperts, _EmptySlots
from .ternary_rounding import SCALES, round_activations, round_weights


__all__ = ["TernaryExperts"]


@use_experts_implementation
class _Ternary(StackedExperts):
    pass


class _Rounded:
    """A bank as implementations see it: rounded matrices, and activations rounded before the second product too."""

    def __init__(self, bank: Any, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, bits: int | None):
        self._bank = bank
        self._bits = bits
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def _stacked(self) -> tuple:
        return self.gate_up_proj, None, self.down_proj, None

    def _apply_gate(self, state: torch.Tensor) -> torch.Tensor:
        return round_activations(self._bank._apply_gate(state), self._bits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bank, name)


class _RoundsFirst(_Ternary):
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # `self` may be another view of the bank, so nothing here may ask for its class.
        up, down = self.gate_up_proj, self.down_proj
        gate_up = up.unflatten(1, (2, -1))  # (N, 2, I, D): W_g and W_u have scales of their own
        view = _Rounded(
            self,
            round_weights(gate_up, self.weight_scale).flatten(1, 2),
            round_weights(down, self.weight_scale),
            self.activation_bits,
        )
        tokens = round_activations(hidden_states, self.activation_bits)
        return _Ternary.forward(view, tokens, top_k_index, top_k_weights)


@register_experts("ternary")
class TernaryExperts(_EmptySlots, _RoundsFirst):
    """E(x) = W_d (act(W_g x) * W_u x) with every matrix rounded to s {-1, 0, 1}, s = mean |W|, and the inputs of every
    product to 8 bits per token; gradients pass both unchanged ([MoTE](https://huggingface.co/papers/2506.14435), on
    the rules of BitNet b1.58, [2402.17764](https://huggingface.co/papers/2402.17764)).

    Parameters are those of `"swiglu"`, in full precision; [`~hf_moe.export_ternary`] replaces them by 2 bits per
    weight when training is over. Keep them in float32 (`bf16=True` of the Trainer does, loading in bfloat16 does not):
    updates are far smaller than what separates two bfloat16 numbers. Weight decay shrinks s, so set none.

    `expert_config` takes:
        scale (`str`, defaults to `"matrix"`): What shares an s: `"matrix"` or `"row"`. The paper does not say.
        activation_bits (`int`, *optional*, defaults to 8): `None` leaves activations alone.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(expert_type="ternary", num_experts=4, num_experts_per_tok=1, num_shared_experts=1)
    ```
    """

    def __init__(self, config: Any):
        options = dict(getattr(config, "expert_config", None) or {})
        self.validate_options(options)
        super().__init__(config)
        self.weight_scale = options.get("scale", "matrix")
        self.activation_bits = options.get("activation_bits", 8)

    @classmethod
    def validate_options(cls, options: dict[str, Any]) -> None:
        unknown = sorted(options.keys() - {"scale", "activation_bits"})
        if unknown:
            raise ValueError(
                f"`expert_config` has {unknown}, which `expert_type='ternary'` does not know. It takes 'scale' and "
                "'activation_bits'."
            )
        if options.get("scale", "matrix") not in SCALES:
            raise ValueError(f"`expert_config['scale']` must be one of {SCALES}, got {options['scale']!r}.")
        bits = options.get("activation_bits", 8)
        if bits is not None and not (isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8):
            raise ValueError(f"`expert_config['activation_bits']` must be None or from 2 to 8, got {bits!r}.")
