"""The consistency loss of MoSA: two passes with different experts should agree."""

import torch
from torch import nn


__all__ = ["feature_distance", "symmetric_kl"]


def symmetric_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r"""1/2 [KL(sg(p2) || p1) + KL(sg(p1) || p2)] of two sets of logits, row by row.

    `sg` stops gradients: each pass is pulled towards what the other one said.

    Args:
        first (`torch.Tensor` of shape `(..., C)`): Logits of the first pass, C classes.
        second (`torch.Tensor` of shape `(..., C)`): Of the second.

    Returns:
        `torch.Tensor` of shape `(...)`, in float32.

    Example:
        ```python
        symmetric_kl(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0]).log())  # 0.1373
        ```

    Paper: MoSA, arXiv 2312.02923.
    """
    log_p, log_q = first.float().log_softmax(-1), second.float().log_softmax(-1)

    def kl(target: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return nn.functional.kl_div(other, target.detach(), reduction="none", log_target=True).sum(-1)

    return 0.5 * (kl(log_q, log_p) + kl(log_p, log_q))


def feature_distance(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean squared difference of the outputs of six blocks, spread evenly through the model, of two passes.

    Note: which six is not known; all blocks are taken where there are no more.

    Args:
        first (`tuple[torch.Tensor]`): Hidden states of the first pass: the embeddings, then each block's output.
        second (`tuple[torch.Tensor]`): Of the second.

    Returns:
        `torch.Tensor`: A scalar in float32.

    Example:
        ```python
        feature_distance(*(model(**batch, output_hidden_states=True).hidden_states for _ in range(2)))
        ```
    """
    blocks = len(first) - 1
    count = min(6, blocks)
    chosen = [(number + 1) * blocks // count for number in range(count)]
    return torch.stack([(first[i].float() - second[i].float()).square().mean() for i in chosen]).mean()
