"""How far a student is from its teacher: hidden states of every layer, and predictions.

Shapes: B batch, S sequence, D hidden, C classes or vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F


__all__ = ["hidden_state_discrepancy", "prediction_discrepancy"]

LOGITS = ("logits", "start_logits", "end_logits")


def hidden_state_discrepancy(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Sum over the embedding output and all layers of the mean squared difference, `sum_l MSE(X_l, X_l^teacher)`.

    [MoEBERT](https://huggingface.co/papers/2204.07675), layer-wise distillation. Computed in float32.

    Note: the released code takes the mean over padding as well.

    Args:
        student, teacher (`Sequence[torch.Tensor]`): `hidden_states` of the two models, each `(B, S, D)`.
        mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 or `False` on padding.

    Returns:
        `torch.Tensor`: 0-dim.

    Example:

    ```python
    >>> hidden_state_discrepancy([torch.zeros(1, 2, 4)], [torch.ones(1, 2, 4)])
    tensor(1.)
    ```
    """
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        squares = (ours.float() - theirs.to(ours.device).float()).square().mean(dim=-1)  # (B, S)
        total = total + _token_mean(squares, mask).to(total.device)
    return total


def prediction_discrepancy(
    student: Mapping[str, Any], teacher: Mapping[str, Any], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Symmetric divergence of the predicted distributions, (KL(p||q) + KL(q||p)) / 2, a mean over sequences or, of
    models that predict at every token, over tokens; the squared difference of logits of regression.

    [MoEBERT](https://huggingface.co/papers/2204.07675), prediction loss. Start and end positions of answers count half
    each.

    Args:
        student, teacher (`Mapping`): Model outputs with `logits` of shape `(B, C)` or `(B, S, C)`, or `start_logits`
            and `end_logits` `(B, S)`.
        mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 or `False` on padding.

    Returns:
        `torch.Tensor`: 0-dim.

    Raises:
        ValueError: the outputs have no logits, or logits of different shapes.

    Example:

    ```python
    >>> same = {"logits": torch.tensor([[1.0, 2.0]])}
    >>> prediction_discrepancy(same, same)
    tensor(0.)
    ```
    """
    names = [name for name in LOGITS if name in student and name in teacher]
    if not names:
        raise ValueError(f"`prediction_weight` needs outputs with one of {list(LOGITS)}, got {sorted(student)}.")
    parts = []
    for name in names:
        ours, theirs = student[name].float(), teacher[name].to(student[name].device).float()
        if ours.shape != theirs.shape:
            raise ValueError(
                f"`prediction_weight` compares predictions, but `{name}` of the student has the shape "
                f"{tuple(ours.shape)} and of the teacher {tuple(theirs.shape)}. Use a teacher for the same task."
            )
        if ours.shape[-1] == 1:
            difference = (ours - theirs).square().squeeze(-1)
        else:
            p, q = F.log_softmax(ours, dim=-1), F.log_softmax(theirs, dim=-1)
            difference = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(dim=-1)
        parts.append(_token_mean(difference, mask if difference.dim() == 2 else None))
    return torch.stack(parts).mean()


def _token_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.mean()
    mask = mask.to(values.device, values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)
