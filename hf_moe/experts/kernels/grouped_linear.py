"""One linear layer per group of rows, as an operator that `torch.compile` does not look into.

Graph capture cannot follow a loop whose bounds are data. The operator hides the loop; everything around it stays
visible, so the compiler fuses gather, activation and weighted sum by itself.

Shapes: S rows sorted by expert, N experts, I in features, O out features.
"""

from typing import Any

import torch


__all__ = ["grouped_linear"]


def grouped_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor,
    is_transposed: bool = False,
) -> torch.Tensor:
    """x_s W_e + b_e for the rows s of each expert e; rows of no expert are 0. Differentiable once.

    Args:
        rows (`torch.Tensor` of shape `(S, I)`): Sorted by expert; rows of no expert come last.
        weight (`torch.Tensor` of shape `(N, O, I)`, or `(N, I, O)` if transposed): Matrices.
        bias (`torch.Tensor` of shape `(N, O)`, *optional*): Biases.
        ends (`torch.Tensor` of shape `(N,)`): Where the rows of each expert end.
        is_transposed (`bool`, *optional*, defaults to `False`): Layout of `weight`.

    Returns:
        `torch.Tensor` of shape `(S, O)`.
    """
    return torch.ops.hf_moe.grouped_linear(rows, weight, bias, ends, is_transposed)


def _segments(ends: torch.Tensor):
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, start, end
        start = end


@torch.library.custom_op("hf_moe::grouped_linear", mutates_args=(), device_types="cpu")
def _grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor, is_transposed: bool
) -> torch.Tensor:
    output = rows.new_empty(rows.shape[0], weight.shape[2 if is_transposed else 1])
    end = 0
    for expert, start, end in _segments(ends):
        matrix = weight[expert] if is_transposed else weight[expert].t()
        if bias is None:
            torch.mm(rows[start:end], matrix, out=output[start:end])
        else:
            torch.addmm(bias[expert], rows[start:end], matrix, out=output[start:end])
    output[end:].zero_()
    return output


@_grouped_linear.register_fake
def _grouped_linear_fake(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor, is_transposed: bool
) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2 if is_transposed else 1])


@torch.library.custom_op("hf_moe::grouped_linear_backward", mutates_args=(), device_types="cpu")
def _grouped_linear_backward(
    grad: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, is_transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_rows = rows.new_empty(rows.shape)
    grad_weight = weight.new_empty(weight.shape)
    grad_bias = weight.new_zeros(weight.shape[0], grad.shape[1])
    chosen = set()
    end = 0
    for expert, start, end in _segments(ends):
        chosen.add(expert)
        x, g = rows[start:end], grad[start:end]
        torch.mm(g, weight[expert].t() if is_transposed else weight[expert], out=grad_rows[start:end])
        left, right = (x, g) if is_transposed else (g, x)
        torch.mm(left.t(), right, out=grad_weight[expert])
        torch.sum(g, dim=0, out=grad_bias[expert])
    grad_rows[end:].zero_()
    for expert in range(weight.shape[0]):
        if expert not in chosen:
            grad_weight[expert].zero_()
    return grad_rows, grad_weight, grad_bias


@_grouped_linear_backward.register_fake
def _grouped_linear_backward_fake(
    grad: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, is_transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        rows.new_empty(rows.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0], grad.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    rows, weight, bias, ends, ctx.is_transposed = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(rows, weight, ends)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, weight, ends = ctx.saved_tensors
    grad_rows, grad_weight, grad_bias = torch.ops.hf_moe.grouped_linear_backward(
        grad.contiguous(), rows, weight, ends, ctx.is_transposed
    )
    return grad_rows, grad_weight, grad_bias if ctx.has_bias else None, None, None


_grouped_linear.register_autograd(_backward, setup_context=_setup_context)
