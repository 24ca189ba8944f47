"""The three products of one expert's rows, by torch or by the compiled operators.

Shapes: R rows, I in features, O out features.
"""

from typing import Any

import torch

from .bank import ExpertBank
from .compiled import compiled_dtypes, load_compiled


__all__ = ["CompiledProducts", "Products", "choose_products"]

# Without the compiled tiles, a product of torch is faster above.
_FEW_ROWS = 64


class Products:
    """By torch.

    Args:
        is_transposed (`bool`, defaults to `False`): Whether matrices are stored `(I, O)` instead of `(O, I)`.
    """

    def __init__(self, is_transposed: bool = False):
        self.is_transposed = is_transposed

    def forward(
        self, x: torch.Tensor, stacked: torch.Tensor, bias: torch.Tensor | None, expert: int, out: torch.Tensor
    ) -> None:
        """out = x W_e + b_e

        Args:
            x (`torch.Tensor` of shape `(R, I)`): Rows of the expert.
            stacked (`torch.Tensor` of shape `(N, O, I)`, or `(N, I, O)` if transposed): Matrices.
            bias (`torch.Tensor` of shape `(N, O)`, *optional*): Biases.
            expert (`int`): e.
            out (`torch.Tensor` of shape `(R, O)`): Where the result goes.
        """
        matrix = stacked.select(0, expert)
        matrix = matrix if self.is_transposed else matrix.t()
        if bias is None:
            torch.mm(x, matrix, out=out)
        else:
            torch.addmm(bias.select(0, expert), x, matrix, out=out)

    def backward(self, grad: torch.Tensor, stacked: torch.Tensor, expert: int, out: torch.Tensor) -> None:
        """out = g W_e^T: `(R, O)` to `(R, I)`."""
        matrix = stacked.select(0, expert)
        torch.mm(grad, matrix.t() if self.is_transposed else matrix, out=out)

    def weight_gradient(self, inputs: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        """out = x^T g, in the layout of the matrices."""
        if self.is_transposed:
            torch.mm(inputs.t(), grad, out=out)
        else:
            torch.mm(grad.t(), inputs, out=out)


class CompiledProducts(Products):
    """By the compiled operators where they are faster: everywhere on a CPU that has their instructions, else for few
    rows."""

    def forward(
        self, x: torch.Tensor, stacked: torch.Tensor, bias: torch.Tensor | None, expert: int, out: torch.Tensor
    ) -> None:
        if x.shape[0] > _FEW_ROWS and not _multiplies(x):
            super().forward(x, stacked, bias, expert, out)
        else:
            torch.ops.hf_moe_compiled.grouped_rows(x, stacked, bias, [expert], [x.shape[0]], out)

    def backward(self, grad: torch.Tensor, stacked: torch.Tensor, expert: int, out: torch.Tensor) -> None:
        if _multiplies(grad):
            torch.ops.hf_moe_compiled.product(grad, stacked.select(0, expert), out)
        else:
            super().backward(grad, stacked, expert, out)

    def weight_gradient(self, inputs: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        if torch.ops.hf_moe_compiled.has_products(grad.dtype):
            torch.ops.hf_moe_compiled.transposed_product(grad, inputs, out)
        else:
            super().weight_gradient(inputs, grad, out)


def choose_products(bank: ExpertBank, compiled: bool = False) -> Products:
    """The products for a bank.

    Args:
        bank ([`ExpertBank`]): Parameters and flags.
        compiled (`bool`, *optional*, defaults to `False`): Use the compiled operators, if they are loaded and read
            banks of this kind.
    """
    if compiled and reads(bank) and load_compiled():
        return CompiledProducts()
    return Products(bank.is_transposed)


def reads(bank: ExpertBank) -> bool:
    """Whether the compiled operators read a bank: along the input features, in one of their dtypes."""
    present: list[Any] = [p for p in bank.parameters if p is not None]
    return not bank.is_transposed and bank.up.dtype in compiled_dtypes and all(p.is_contiguous() for p in present)


def _multiplies(rows: torch.Tensor) -> bool:
    """Whether tiles sum over the columns of a matrix: bfloat16 is read in pairs."""
    is_paired = rows.dtype == torch.float32 or rows.shape[1] % 2 == 0
    return is_paired and bool(torch.ops.hf_moe_compiled.has_products(rows.dtype))
