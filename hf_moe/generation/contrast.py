"""The contrast of two streams' logits. Shapes: B batch, V vocabulary."""

import math

import torch


__all__ = ["contrast_logits"]


def contrast_logits(
    strong_logits: torch.Tensor, weak_logits: torch.Tensor, beta: float = 0.5, alpha: float = 0.1
) -> torch.Tensor:
    r"""Strong logits pushed away from the weak ones, where the strong stream finds a token plausible.

    The formula of self-contrast (https://huggingface.co/papers/2405.14507): `(1 + beta) z_s - beta z_w` for the tokens
    with `z_s >= log(alpha) + max z_s`, minus infinity for the others. The cut is that of `p_s >= alpha max p_s`.

    Args:
        strong_logits (`torch.Tensor` of shape `(B, V)`): z_s.
        weak_logits (`torch.Tensor` of shape `(B, V)`): z_w.
        beta (`float`, *optional*, defaults to 0.5): Strength of the contrast; 0 leaves the strong logits.
        alpha (`float`, *optional*, defaults to 0.1): Share of the best token's probability that a token must reach;
            0 keeps every token, 1 the best one alone.

    Returns:
        `torch.Tensor` of shape `(B, V)`, float32: in bfloat16 the cut would be finer than what large logits resolve.

    Raises:
        ValueError: The shapes differ.

    Example:
        ```python
        >>> contrast_logits(torch.tensor([[2.0, 1.5, 0.0, -1.0]]), torch.tensor([[2.2, 0.4, 0.9, -1.0]]))
        tensor([[ 1.9000,  2.0500, -0.4500,    -inf]])
        ```
    """
    if strong_logits.shape != weak_logits.shape:
        raise ValueError(
            f"`weak_logits` must have the shape of `strong_logits` {tuple(strong_logits.shape)}, got "
            f"{tuple(weak_logits.shape)}."
        )
    strong, weak = strong_logits.float(), weak_logits.float()
    cut = strong.amax(dim=-1, keepdim=True) + (math.log(alpha) if alpha > 0 else -math.inf)
    # a token that the model itself rules out is minus infinity in both streams, and their difference no number
    valid = (strong >= cut) & (strong > -math.inf)
    return torch.where(valid, strong + beta * (strong - weak), -math.inf)
