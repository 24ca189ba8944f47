"""Whom the gate should choose, and from which probability on it may choose the local expert."""

import torch


__all__ = ["calibrate_threshold", "gate_labels"]

IGNORE = -1


def gate_labels(
    global_right: torch.Tensor, local_right: torch.Tensor, custom: torch.Tensor, target: str = "correctness"
) -> torch.Tensor:
    """1 where the local expert should answer, 0 where the global one should, -1 where it does not matter.

    With both right, the generic examples go to the global expert and the user's are left out. With both wrong, all
    are left out.

    Args:
        global_right (`torch.Tensor` of shape `(M,)`): Where the global expert is right.
        local_right (`torch.Tensor` of shape `(M,)`): Where the local expert is right, on data it was not fitted to.
        custom (`torch.Tensor` of shape `(M,)`): Which examples are the user's.
        target (`str`, defaults to `"correctness"`): `"domain"` labels all of the user's examples 1, the others 0.

    Returns:
        `torch.Tensor` of shape `(M,)`, int64.

    Example:
        ```python
        gate_labels(torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([True, True]))  # [0, 1]
        ```
    """
    if target == "domain":
        return custom.long()
    labels = torch.full_like(custom, IGNORE, dtype=torch.long)
    labels[local_right & ~global_right] = 1
    labels[global_right & ~local_right] = 0
    labels[global_right & local_right & ~custom] = 0
    return labels


def calibrate_threshold(
    gate: torch.Tensor, global_right: torch.Tensor, local_right: torch.Tensor, max_drop: float
) -> float:
    """The smallest threshold with which the accuracy on generic data drops by no more than `max_drop`.

    Args:
        gate (`torch.Tensor` of shape `(M,)`): Gate probabilities on held-out generic examples.
        global_right (`torch.Tensor` of shape `(M,)`): Where the global expert is right.
        local_right (`torch.Tensor` of shape `(M,)`): Where the local expert is right.
        max_drop (`float`): Fraction of the examples.

    Returns:
        `float`: 2.0 (never the local expert) only if no threshold up to 1 will do.
    """
    order = gate.double().argsort()
    gate = gate.double()[order]
    difference = (global_right.long() - local_right.long())[order]
    # lost[i]: how many more are wrong when the local expert answers from the i-th smallest probability on
    lost = torch.cat([difference.flip(0).cumsum(0).flip(0), difference.new_zeros(1)])
    allowed = (lost <= max_drop * len(gate)).nonzero().squeeze(-1)
    for i in allowed.tolist():
        if i == 0:
            return 0.0
        below, above = gate[i - 1].item(), gate[i].item() if i < len(gate) else 1.0
        if below < above:  # equal probabilities cannot be told apart
            return (below + above) / 2
    return 2.0
