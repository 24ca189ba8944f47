"""Token losses of a causal language model, one row per sequence.

Shapes: B batch, S sequence, V vocabulary.
"""

import torch
from torch.nn import functional as F


__all__ = ["token_losses"]


def token_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> dict[str, torch.Tensor]:
    """Mean cross-entropy of each sequence and the tokens it was taken over; logits at position t predict label t + 1.

    Args:
        logits (`torch.Tensor` of shape `(B, S, V)`): As the model returns them.
        labels (`torch.Tensor` of shape `(B, S)`): Token ids, not shifted.
        ignore_index (`int`, defaults to -100): Label of positions that do not count.

    Returns:
        `dict`: `losses` `(B,)` in nats (float64, 0 where nothing counts) and `num_tokens` `(B,)`: what [`Perplexity`]
        takes.

    Raises:
        ValueError: the shapes do not belong together.

    Example:
        ```python
        metric.add_batch(**token_losses(outputs.logits, batch["labels"]))
        ```
    """
    if logits.dim() != 3 or labels.dim() != 2 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"`logits` must have shape (B, S, V) and `labels` (B, S), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    targets = labels[:, 1:].to(logits.device)
    # One sequence at a time: the float32 copy of all logits would be the largest tensor of an evaluation.
    sums = torch.stack(
        [
            F.cross_entropy(row[:-1].float(), target, ignore_index=ignore_index, reduction="sum").double()
            for row, target in zip(logits, targets, strict=True)
        ]
    )  # (B,)
    num_tokens = targets.ne(ignore_index).sum(dim=-1)  # (B,)
    return {"losses": sums / num_tokens.clamp(min=1), "num_tokens": num_tokens}
