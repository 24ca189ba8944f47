"""Contrastive loss over the pairs of all processes, and how well pairs find each other.

Shapes: B pairs of a process, W processes, E embedding, C classes.
"""

import torch
from torch.nn import functional as F


__all__ = ["contrastive_loss", "gather_with_gradients", "retrieval_recall", "zero_shot_accuracy"]


def gather_with_gradients(embeddings: torch.Tensor) -> torch.Tensor:
    """`(B, E)` of every process as `(W B, E)`; gradients go back to the process they belong to.

    One process alone gets its own. Every process must have the same B.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return embeddings
    if torch.distributed.get_world_size() == 1:
        return embeddings
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(embeddings))


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    label_smoothing: float = 0.0,
    gather: bool = True,
) -> torch.Tensor:
    r"""Mean of both directions' cross-entropy of s <f_I, f_T> with the right pair: symmetric InfoNCE, CLIP's loss.

    Every process computes the loss of the pairs of all, so that the mean of their gradients, which data parallelism
    takes, is the gradient of the whole batch.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, E)`): Of length 1.
        logit_scale (`torch.Tensor` or `float`): s.
        label_smoothing (`float`, defaults to 0.0): Share of the target that is spread over all pairs.
        gather (`bool`, defaults to `True`): Pairs of other processes are negatives too.

    Example:

    ```python
    >>> same = torch.ones(4, 1)
    >>> contrastive_loss(same, same, 100.0)  # ln 4
    tensor(1.3863)
    ```
    """
    if gather:
        image_embeds, text_embeds = gather_with_gradients(image_embeds), gather_with_gradients(text_embeds)
    logits = logit_scale * image_embeds.float() @ text_embeds.float().T
    target = torch.arange(len(logits), device=logits.device)
    both = [F.cross_entropy(side, target, label_smoothing=label_smoothing) for side in (logits, logits.T)]
    return (both[0] + both[1]) / 2


@torch.no_grad()
def retrieval_recall(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, ks: tuple[int, ...] = (1, 5), chunk_size: int = 1024
) -> dict[str, float]:
    """Share of images whose caption is among the k nearest captions, and of captions whose image is.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(P, E)`): Pair i is row i of both.
        ks (`tuple[int, ...]`, defaults to `(1, 5)`): k.
        chunk_size (`int`, defaults to 1024): Rows compared at a time.

    Returns:
        `dict`: `image_to_text@k` and `text_to_image@k`. Of equally near ones the right one counts as last.
    """
    found = {}
    for name, one, other in (
        ("image_to_text", image_embeds, text_embeds),
        ("text_to_image", text_embeds, image_embeds),
    ):
        better = []
        for start in range(0, len(one), chunk_size):
            rows = one[start : start + chunk_size].float() @ other.float().T  # (chunk, P)
            right = rows.gather(1, torch.arange(start, start + len(rows), device=rows.device)[:, None])
            better.append((rows >= right).sum(dim=1) - 1)
        rank = torch.cat(better)
        found |= {f"{name}@{k}": (rank < k).float().mean().item() for k in ks}
    return found


@torch.no_grad()
def zero_shot_accuracy(image_embeds: torch.Tensor, class_embeds: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose nearest class text is the right one.

    Args:
        image_embeds (`torch.Tensor` of shape `(P, E)`): Images.
        class_embeds (`torch.Tensor` of shape `(C, E)`): One text per class.
        labels (`torch.Tensor` of shape `(P,)`): Right classes.
    """
    nearest = (image_embeds.float() @ class_embeds.float().T).argmax(dim=-1)
    return (nearest == labels.to(nearest.device)).float().mean().item()
