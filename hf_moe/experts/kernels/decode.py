"""Few tokens, no gradients: read each chosen expert's weights once and do next to nothing else.

The products of all chosen experts come first, one activation for all rows next, then the second products: two small
operations per expert. Nothing is gathered from the weights, and one token needs no sort.

Shapes: T tokens, K slots per token, S slots in use, D hidden, I intermediate, W = 2I or I.
"""

from collections.abc import Callable
from typing import Any

import torch

from .bank import ExpertBank
from .combine import combine
from .dispatch import Segment, compact_dispatch
from .epilogue import compiled_epilogue


__all__ = ["decode_experts"]

# BLAS reads the matrix at half the speed for (rows, in) times (in, out) with so few rows, in float32; not for one row.
_FEW_ROWS = range(2, 4)

# (rows, stacked, bias, segments, is_transposed, out)
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, list[Segment], bool, torch.Tensor], None]


def decode_experts(
    bank: ExpertBank,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    compiled: bool = False,
) -> torch.Tensor:
    """Runs the experts of a bank whose epilogue has no parameters, without gradients.

    Args:
        bank ([`ExpertBank`]): Parameters and flags; `epilogue` must not be `None`.
        hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens, in the dtype of the bank.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Experts; N and above marks an empty slot.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Weights, of any floating dtype.
        compiled (`bool`, *optional*, defaults to `False`): Multiply with the compiled operator, which must be loaded.

    Returns:
        `torch.Tensor` of shape `(T, D)`.
    """
    linear = _compiled_linear if compiled else _linear
    with torch.no_grad():
        if hidden_states.shape[0] == 1:
            return _one_token(bank, hidden_states, top_k_index, top_k_weights, linear)
        dispatch = compact_dispatch(top_k_index, bank.num_experts)
        rows = hidden_states.index_select(0, dispatch.tokens)
        rows = _rows(bank, rows, dispatch.segments, linear)
        return combine(rows, dispatch, top_k_weights, hidden_states.shape[0])


def _one_token(
    bank: ExpertBank,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    linear: Linear,
) -> torch.Tensor:
    chosen = top_k_index[0].tolist()
    used = [k for k, expert in enumerate(chosen) if expert < bank.num_experts]
    if not used:
        return torch.zeros_like(hidden_states)
    segments = [Segment(chosen[k], row, row + 1) for row, k in enumerate(used)]
    rows = _rows(bank, hidden_states.expand(len(used), -1), segments, linear)  # (S, D)
    weights = top_k_weights if len(used) == len(chosen) else top_k_weights[:, used]
    if weights.dtype != rows.dtype:
        return torch.mm(weights.float(), rows.float()).to(hidden_states.dtype)
    return torch.mm(weights, rows)


def _rows(bank: ExpertBank, rows: torch.Tensor, segments: list[Segment], linear: Linear) -> torch.Tensor:
    """Outputs `(S, D)` of the experts for rows sorted by segment."""
    parameters: list[Any] = [None if p is None else p.detach() for p in bank.parameters]
    up, up_bias, down, down_bias = parameters
    epilogue = bank.require_epilogue()
    if linear is _compiled_linear:
        epilogue = compiled_epilogue(epilogue, rows.dtype)
    width, intermediate = (up.shape[2], down.shape[1]) if bank.is_transposed else (up.shape[1], down.shape[2])
    projected = rows.new_empty(rows.shape[0], width)
    linear(rows, up, up_bias, segments, bank.is_transposed, projected)
    activated = epilogue.forward(projected, rows.new_empty(rows.shape[0], intermediate))
    output = rows.new_empty(rows.shape)
    linear(activated, down, down_bias, segments, bank.is_transposed, output)
    return output


def _linear(
    rows: torch.Tensor,
    stacked: torch.Tensor,
    bias: torch.Tensor | None,
    segments: list[Segment],
    is_transposed: bool,
    out: torch.Tensor,
) -> None:
    for expert, start, end in segments:
        x, y, matrix = rows[start:end], out[start:end], stacked.select(0, expert)
        if not is_transposed and end - start in _FEW_ROWS and x.dtype == torch.float32:
            y.copy_(torch.mm(matrix, x.t()).t())  # W x as it lies in memory, then y is turned
            if bias is not None:
                y += bias.select(0, expert)
            continue
        matrix = matrix if is_transposed else matrix.t()
        if bias is None:
            torch.mm(x, matrix, out=y)
        else:
            torch.addmm(bias.select(0, expert), x, matrix, out=y)


def _compiled_linear(
    rows: torch.Tensor,
    stacked: torch.Tensor,
    bias: torch.Tensor | None,
    segments: list[Segment],
    is_transposed: bool,
    out: torch.Tensor,
) -> None:
    if is_transposed or not stacked.is_contiguous():  # the operator reads along the input features
        _linear(rows, stacked, bias, segments, is_transposed, out)
        return
    experts = [segment.expert for segment in segments]
    ends = [segment.end for segment in segments]
    bias = None if bias is None else bias.contiguous()
    torch.ops.hf_moe_compiled.grouped_rows(rows.contiguous(), stacked, bias, experts, ends, out)
