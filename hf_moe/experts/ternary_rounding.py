"""Rounding of weights to {-s, 0, s} and of activations to 8 bits, with straight-through gradients.

BitNet b1.58 ([2402.17764](https://huggingface.co/papers/2402.17764), Sec. 2), which MoTE
([2506.14435](https://huggingface.co/papers/2506.14435)) uses for its routed experts.

Shapes: N experts, R output rows, D input columns.
"""

import torch


__all__ = ["SCALES", "round_activations", "round_weights", "straight_through", "ternary_codes"]

#: What shares one scale s: a whole matrix of one expert, or one of its rows.
SCALES = ("matrix", "row")
#: Smallest scale of a matrix, and smallest largest activation of a token.
SMALLEST = 1e-5


def ternary_codes(weight: torch.Tensor, scale: str = "matrix") -> tuple[torch.Tensor, torch.Tensor]:
    """s = mean |W|, Q = clip(round(W / s), -1, 1).

    Args:
        weight (`torch.Tensor` of shape `(..., R, D)`): Matrices.
        scale (`str`, defaults to `"matrix"`): One of [`SCALES`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Q as int8 of shape `(..., R, D)`, and s in float32 of shape `(..., 1, 1)`
        or `(..., R, 1)`.
    """
    weight = weight.detach().float()
    axes = (-2, -1) if scale == "matrix" else (-1,)
    s = weight.abs().mean(dim=axes, keepdim=True).clamp(min=SMALLEST)
    return (weight / s).round().clamp(-1, 1).to(torch.int8), s


def round_weights(weight: torch.Tensor, scale: str = "matrix") -> torch.Tensor:
    """s Q in the type of `weight`; the gradient passes unchanged, also where values were clipped."""
    codes, s = ternary_codes(weight, scale)
    return straight_through(weight, (s * codes).to(weight.dtype))


def round_activations(hidden_states: torch.Tensor, bits: int | None = 8) -> torch.Tensor:
    """a = 127 / max |x| per token; clip(round(a x), -128, 127) / a, with the gradient passed unchanged.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., D)`): Tokens.
        bits (`int`, *optional*, defaults to 8): `None` leaves them as they are.
    """
    if bits is None:
        return hidden_states
    values = hidden_states.detach().float()
    top = 2 ** (bits - 1) - 1
    a = top / values.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST)
    rounded = (a * values).round().clamp(-top - 1, top) / a
    return straight_through(hidden_states, rounded.to(hidden_states.dtype))


def straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, bit for bit, with the gradient of `value`."""
    return rounded + (value - value.detach()) if value.requires_grad else rounded
