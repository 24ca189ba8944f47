r"""The whole expert bank as one differentiable function: gather, two projections per expert, epilogue, weighted sum.

Forward, for the rows of expert e: h = x W_u, a = act(h), y = a W_d, and out_t = sum of w y over the slots of t. Rows
are taken expert by expert, and a few hundred at a time, so that what lies between the two products stays in cache;
nothing but the rows of y is as long as the batch. Backward keeps h only and uses

    G = g W_d^T        dw = sum_i a_i G_i (+ g b_d)     da = w G       dW_d = a^T (w g)
    dh = act'(h) da    dW_u = x^T dh                    dx = dh W_u^T

so neither y nor the scaled gradient of it is ever stored, dh takes the place of h once nobody needs h again, and each
gradient is written where it belongs: until then its memory holds what is needed on the way (a, G and da in that of
dW_u, g and x in that of dx).

Rows may be rounded up (see `buckets.py`): the product then also covers the first rows of the next expert, which are
overwritten when that expert's turn comes; in backward the surplus rows of one side are zeroed.

Shapes: T tokens, K slots per token, S slots in use, N experts, D hidden, I intermediate, W = 2I or I.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .bank import ExpertBank
from .buckets import bucket_rows
from .combine import combine
from .dispatch import Dispatch, compact_dispatch
from .epilogue import Epilogue, compiled_epilogue
from .first_order import first_order_only
from .products import CompiledProducts, Products, choose_products
from .workspace import Borrowed, workspace


__all__ = ["fused_experts"]


# Rows per product: enough for its full speed, few enough for the activations of the widest experts to stay in cache.
_PIECE = 512

# Rows per step of the elementwise part of the backward pass, at least, where memory for more is not at hand.
_FEWEST = 64


class _Plan(NamedTuple):
    dispatch: Dispatch
    epilogue: Epilogue
    products: Products
    is_bucketed: bool

    def rounded(self, rows: int) -> int:
        return bucket_rows(rows) if self.is_bucketed else rows

    @property
    def max_rows(self) -> int:
        """Rows of the busiest expert."""
        return self.rounded(self.dispatch.max_rows)

    @property
    def max_piece(self) -> int:
        """Rows of the longest piece."""
        return min(_PIECE, self.max_rows)

    @property
    def padded_rows(self) -> int:
        """S, and room for what the last products write beyond."""
        return max((start + self.rounded(end - start) for _, start, end in self.dispatch.segments), default=0)


def fused_experts(
    bank: ExpertBank,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    bucketed: bool = False,
    compiled: bool = False,
) -> torch.Tensor:
    """Runs the experts of a bank whose epilogue has no parameters.

    Args:
        bank ([`ExpertBank`]): Parameters and flags; `epilogue` must not be `None`.
        hidden_states (`torch.Tensor` of shape `(T, D)`): Tokens, in the dtype of the bank.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Experts; N and above marks an empty slot.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Weights, of any floating dtype.
        bucketed (`bool`, *optional*, defaults to `False`): Round row counts up, so that few kernels are generated.
        compiled (`bool`, *optional*, defaults to `False`): Multiply with the compiled operators where they can.

    Returns:
        `torch.Tensor` of shape `(T, D)`.

    Raises:
        ValueError: The bank has no epilogue.
    """
    products = choose_products(bank, compiled)
    epilogue = bank.require_epilogue()
    if isinstance(products, CompiledProducts):
        epilogue = compiled_epilogue(epilogue, bank.up.dtype)
    plan = _Plan(compact_dispatch(top_k_index, bank.num_experts), epilogue, products, bucketed)
    inputs: tuple[Any, ...] = (hidden_states, top_k_weights, *bank.parameters)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in inputs):
        return _FusedExperts.apply(plan, *inputs)
    detached: list[Any] = [None if p is None else p.detach() for p in inputs]
    return _forward(plan, *detached)[0]


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    """`(start, end)` of runs of at most `_PIECE` rows, none much shorter than the others."""
    parts = -(-count // _PIECE)
    length = -(-count // (parts * 64)) * 64 if parts > 1 else _PIECE
    for start in range(0, count, length):
        yield start, min(start + length, count)


def _forward(
    plan: _Plan,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dispatch, dtype = plan.dispatch, hidden_states.dtype
    hidden = hidden_states.shape[-1]
    width, intermediate = _widths(plan, up, down)
    output = workspace.take("output rows", (plan.padded_rows, hidden), dtype)
    inputs = workspace.take("rows", (plan.max_piece, hidden), dtype)
    activated = workspace.take("activated", (plan.max_piece, intermediate), dtype)
    kept: Any = None
    if keep:
        kept = hidden_states.new_empty(plan.padded_rows, width)
    else:
        projected = workspace.take("projected", (plan.max_piece, width), dtype)
    for expert, first, last in dispatch.segments:
        for piece_start, piece_end in _pieces(last - first):
            start, end = first + piece_start, first + piece_end
            rows = plan.rounded(end - start)
            x, a = inputs[:rows], activated[:rows]
            torch.index_select(hidden_states, 0, dispatch.tokens[start:end], out=inputs[: end - start])
            h = kept[start : start + rows] if keep else projected[:rows]
            plan.products.forward(x, up, up_bias, expert, h)
            plan.epilogue.forward(h, a)
            plan.products.forward(a, down, down_bias, expert, output[start : start + rows])
    if keep:
        kept[dispatch.num_rows :].zero_()  # surplus rows of the last expert
    return combine(output[: dispatch.num_rows], dispatch, weights, hidden_states.shape[0]), kept


def _backward(
    plan: _Plan,
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    kept: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    workspace.release("rows", "activated")  # of the forward pass: they would only add to the peak
    dispatch, dtype = plan.dispatch, hidden_states.dtype
    tokens, hidden = hidden_states.shape
    width, intermediate = _widths(plan, up, down)
    need_x, need_w, need_up, need_up_bias, need_down, need_down_bias = needs
    need_projected = need_x or need_up or need_up_bias
    weight_rows = weights.reshape(-1)[dispatch.slots]  # (S,)
    grad_weight_rows: Any = torch.empty_like(weight_rows) if need_w else None
    grads: list[Any] = [
        _gradient_like(parameter, dispatch) if need and parameter is not None else None
        for parameter, need in zip((up, up_bias, down, down_bias), needs[2:], strict=True)
    ]
    grad_up, grad_up_bias, grad_down, grad_down_bias = grads
    grad_rows: Any = workspace.take("output rows", (plan.padded_rows, hidden), dtype) if need_x else None
    in_place = not _graph_is_kept()
    h_buffer = kept if in_place else workspace.take("projected", (plan.max_rows, width), dtype)
    for expert, start, end in dispatch.segments:
        count, rows = end - start, plan.rounded(end - start)
        # first the gradient's rows, then the input's, then the gradient of the input
        buffer = grad_rows[start : start + rows] if need_x else workspace.take("rows", (rows, hidden), dtype)
        g = _gather(grad, dispatch.tokens[start:end], buffer)
        room = Borrowed(grad_up[expert] if need_up else None)
        a = room.take("activated", (rows, intermediate), dtype)
        longest = plan.rounded(max(last - first for first, last in _pieces(count)))
        back_buffer = room.take("activated gradient", (longest, intermediate), dtype)
        step = max(_FEWEST, room.rows_left(intermediate, longest))
        scratch = room.take("scratch", (min(step, longest), intermediate), dtype)
        w = weight_rows[start:end, None]
        h = kept[start : start + rows]
        if not in_place:
            h = h_buffer[:rows].copy_(h)
        if need_w or need_down:
            plan.epilogue.forward(h, a)
        for first, last in _pieces(count):
            back = back_buffer[: plan.rounded(last - first)]
            plan.products.backward(g[first : first + back.shape[0]], down, expert, back)  # G
            for i in range(first, last, step):
                j = min(i + step, last)
                da, temporary = back[i - first : j - first], scratch[: j - i]
                if need_w:
                    torch.mul(a[i:j], da, out=temporary)
                    torch.sum(temporary, dim=-1, dtype=weights.dtype, out=grad_weight_rows[start + i : start + j])
                if need_projected:
                    plan.epilogue.backward(h[i:j], da.mul_(w[i:j]), temporary)  # h is dh from here on
        if need_w and down_bias is not None:
            grad_weight_rows[start:end] += torch.mm(g[:count], down_bias[expert][:, None])[:, 0]
        if need_down or need_down_bias:
            g[:count].mul_(w)
        if need_down:
            plan.products.weight_gradient(a, g, grad_down[expert])
        if need_down_bias:
            torch.sum(g[:count], dim=0, out=grad_down_bias[expert])
        if need_up:
            x = _gather(hidden_states, dispatch.tokens[start:end], buffer)
            plan.products.weight_gradient(x, h, grad_up[expert])
        if need_up_bias:
            torch.sum(h[:count], dim=0, out=grad_up_bias[expert])
        if need_x:
            plan.products.backward(h, up, expert, grad_rows[start : start + rows])
    grad_x = combine(grad_rows[: dispatch.num_rows], dispatch, None, tokens) if need_x else None
    grad_w = None
    if need_w:
        grad_w = weights.new_zeros(weights.numel()).scatter_(0, dispatch.slots, grad_weight_rows).view_as(weights)
    return grad_x, grad_w, *grads


def _graph_is_kept() -> bool:
    """Whether somebody may run this backward again (`retain_graph`), so that what it reads must stay as it is."""
    autograd = getattr(torch._C, "_autograd", None)
    asks = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return asks is None or asks()


def _widths(plan: _Plan, up: torch.Tensor, down: torch.Tensor) -> tuple[int, int]:
    return (up.shape[2], down.shape[1]) if plan.products.is_transposed else (up.shape[1], down.shape[2])


def _gather(source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    count = index.shape[0]
    torch.index_select(source, 0, index, out=out[:count])
    out[count:].zero_()
    return out


def _gradient_like(parameter: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """Memory for a stacked gradient in which only the experts that nobody chose are filled, with zeros."""
    gradient = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    chosen = {segment.expert for segment in dispatch.segments}
    for expert in range(parameter.shape[0]):
        if expert not in chosen:
            gradient[expert].zero_()
    return gradient


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *inputs: Any) -> torch.Tensor:
        output, kept = _forward(plan, *inputs, keep=True)
        ctx.plan = plan
        ctx.save_for_backward(*inputs, kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            grads = _backward(ctx.plan, needs, grad, *ctx.saved_tensors)
        return None, *first_order_only(grads, grad)
