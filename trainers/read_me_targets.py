"""What Read-ME's router learns: which expert has the channels a token uses.

Shapes: T tokens, N experts, I channels of the dense feed-forward.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


__all__ = ["DISTILL_TARGETS", "bucketed_overlap", "distillation_loss", "mask_overlap"]

DISTILL_TARGETS = ("overlap", "bucketed")
# Of the released code: the target logits are centred overlaps times this.
BUCKET_SCALE = 10.0
HARD_WEIGHT, SOFT_WEIGHT, LABEL_SMOOTHING = 0.75, 0.25, 0.5


def mask_overlap(activations: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """o_j = |M_0 and M_j|: of the token's own top channels by |a|, as many as an expert keeps, those that it keeps.

    Args:
        activations (`torch.Tensor` of shape `(T, I)`): a = act(W_g x) * (W_u x) of the dense model.
        masks (`torch.Tensor` of shape `(N, I)`): Boolean, M_j; all have equally many channels.

    Returns:
        `torch.Tensor` of shape `(T, N)`, float32.

    Example:
        ```python
        mask_overlap(torch.tensor([[3.0, -2.0, 0.1]]), torch.eye(3, dtype=torch.bool))  # [[1., 0., 0.]]
        ```
    """
    keep = int(masks[0].sum())
    top = activations.abs().topk(keep, dim=-1).indices
    own = torch.zeros_like(activations, dtype=torch.float32).scatter(-1, top, 1.0)  # M_0, (T, I)
    return own @ masks.to(own).t()


def bucketed_overlap(activations: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The released code's finer overlap: a channel counts once for each of the five sets of I - 1, 4I/5, 3I/5, 2I/5
    and I/5 top channels that it is in, with weight 1/(3I), and channels that all experts keep do not count.

    Note: the code ranks channels by signed a, though the masks were made by |a|, and by a strict comparison that
    leaves one out. |a| and whole sets here.

    Args:
        activations (`torch.Tensor` of shape `(T, I)`), masks (`torch.Tensor` of shape `(N, I)`): See [`mask_overlap`].

    Returns:
        `torch.Tensor` of shape `(T, N)`, float32.
    """
    sizes, width = activations.abs().float(), activations.shape[-1]
    counts = [max(1, count) for count in (width - 1, *(width * part // 5 for part in (4, 3, 2, 1)))]
    ordered = sizes.sort(dim=-1, descending=True).values
    levels = torch.stack([sizes >= ordered[:, count - 1 : count] for count in counts])  # (5, T, I)
    own = masks & ~masks.all(dim=0)
    return levels.float().sum(dim=0) / (3 * width) @ own.to(sizes).t()


def distillation_loss(
    router_logits: torch.Tensor,
    overlaps: Sequence[torch.Tensor],
    distill_target: str = "overlap",
    temperature: float = 1.0,
) -> torch.Tensor:
    r"""L_RD of each token, summed over layers (Read-ME, 2410.19123, Sec. 3).

    `"overlap"` is the paper's KL(softmax(G) || softmax(o)). Overlaps are counts in the thousands, whose softmax would
    be all or nothing, so they are standardised over the experts and divided by `temperature` (our choice).
    `"bucketed"` is the released code's 0.75 CE(argmax o, label smoothing 0.5) + 0.25 CE(softmax(10 (o - mean o))).

    Args:
        router_logits (`torch.Tensor` of shape `(T, N)`): G, the same for all layers.
        overlaps (`Sequence[torch.Tensor]`): o of each layer, `(T, N)`.
        distill_target (`str`, defaults to `"overlap"`): One of `DISTILL_TARGETS`.
        temperature (`float`, defaults to 1.0): Of `"overlap"`.

    Returns:
        `torch.Tensor` of shape `(T,)`.
    """
    log_probabilities = router_logits.float().log_softmax(-1)  # (T, N)
    loss = log_probabilities.new_zeros(log_probabilities.shape[0])
    for overlap in overlaps:
        centred = overlap - overlap.mean(dim=-1, keepdim=True)
        if distill_target == "overlap":
            spread = centred.square().mean(dim=-1, keepdim=True).sqrt()
            target = (centred / spread.clamp_min(1e-6) / temperature).log_softmax(-1)  # uniform where all are alike
            loss = loss + (log_probabilities.exp() * (log_probabilities - target)).sum(-1)
        else:
            hard = F.cross_entropy(
                router_logits.float(), overlap.argmax(-1), label_smoothing=LABEL_SMOOTHING, reduction="none"
            )
            soft = -((BUCKET_SCALE * centred).softmax(-1) * log_probabilities).sum(-1)
            loss = loss + HARD_WEIGHT * hard + SOFT_WEIGHT * soft
    return loss
