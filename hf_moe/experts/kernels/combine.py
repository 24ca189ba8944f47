"""The weighted sum over the slots of each token.

Shapes: T tokens, K slots per token, S slots in use, D hidden.
"""

import torch

from .dispatch import Dispatch


__all__ = ["combine"]


def combine(
    rows: torch.Tensor, dispatch: Dispatch, weights: torch.Tensor | None, tokens: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Sum over the slots of each token, accumulated in float32, in slot order: the same from run to run.

    Args:
        rows (`torch.Tensor` of shape `(S, D)`): One row per slot in use, sorted by expert.
        dispatch ([`Dispatch`]): Where they belong.
        weights (`torch.Tensor` of shape `(T, K)`, *optional*): Factors; 1 by default.
        tokens (`int`): T.
        dtype (`torch.dtype`, *optional*): Of the result; that of `rows` by default.

    Returns:
        `torch.Tensor` of shape `(T, D)`.
    """
    dtype = dtype or rows.dtype
    if not dispatch.num_rows:
        return rows.new_zeros(tokens, rows.shape[-1], dtype=dtype)
    if weights is not None:
        weights = weights.reshape(-1)
        weights = weights if dispatch.in_use is None else weights[dispatch.in_use]
        if weights.dtype != rows.dtype:  # the bag wants one dtype: the wider of the two
            wider = torch.promote_types(weights.dtype, rows.dtype)
            rows, weights = rows.to(wider), weights.to(wider)
    # A bag of embeddings is this sum, in one pass over the rows.
    return torch.embedding_bag(rows, dispatch.rows, dispatch.offsets, False, 0, False, weights)[0].to(dtype)
