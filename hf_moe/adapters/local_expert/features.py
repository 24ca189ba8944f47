"""What a gate reads: which width a module's output has, and how it becomes one vector per answer."""

from typing import Any

import torch
from torch import nn


__all__ = ["feature_width", "pool"]


def pool(q: torch.Tensor, f: torch.Tensor, pooling: str, mask: torch.Tensor | None) -> torch.Tensor:
    """One feature vector per answer of the head.

    Args:
        q (`torch.Tensor`): `(B, Q)`, a sequence `(B, S, Q)`, or a picture `(B, Q, height, width)`.
        f (`torch.Tensor`): The head's input, `(B, D)` or `(B, S, D)`.
        pooling (`str`): `"mean"` or `"first"`.
        mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 for padding.

    Returns:
        `torch.Tensor`: `(B, Q)`, or `(B, S, Q)` for a head that answers at each position.
    """
    if q.ndim == 4:
        q = q.flatten(2).transpose(1, 2)  # (B, pixels, Q)
        mask = None
    if q.ndim == 2 or (f.ndim == 3 and q.shape[:2] == f.shape[:2]):
        return q
    if pooling == "first":
        return q[:, 0]
    if mask is None or mask.shape != q.shape[:2]:
        return q.mean(dim=1)
    weights = mask.to(q.dtype).unsqueeze(-1)  # (B, S, 1)
    return (q * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def feature_width(module: nn.Module, config: Any) -> int | None:
    """Number of channels a module returns, as far as it can be read off it.

    Args:
        module (`nn.Module`): The module.
        config (*optional*): Config of the model, whose `hidden_size` is the last resort.

    Returns:
        `int` or `None`.
    """
    for name in ("out_features", "out_channels", "embedding_dim", "num_features"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    shape = getattr(module, "normalized_shape", None)
    if shape:
        return int(shape[-1])
    return getattr(config, "hidden_size", None)
