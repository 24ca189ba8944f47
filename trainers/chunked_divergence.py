"""Forward KL divergence between teacher and student, a few positions at a time.

Shapes: M positions, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


__all__ = ["chunked_divergence"]

Head = Callable[[torch.Tensor], torch.Tensor]


def chunked_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    chunk_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Sums over positions of T^2 KL(p_T || p_S) = T^2 \sum_v p_T(v) (log p_T(v) - log p_S(v)), p = softmax(z / T),
    and of the cross-entropy of the student with the targets.

    Logits exist for one chunk at a time, of the student and of the teacher: the student's are made again in the
    backward pass. Memory is that of `chunk_size` x V numbers in place of M x V.

    Args:
        student (`torch.Tensor` of shape `(M, D)`): The student's last hidden states, with gradients.
        teacher (`torch.Tensor` of shape `(M, D')`): The teacher's, on its own device.
        targets (`torch.Tensor` of shape `(M,)`): Next token of each position; -100 leaves it out of the cross-entropy.
        student_head, teacher_head (`Callable`): Hidden states to logits, of the same V.
        temperature (`float`, defaults to 1.0): T of both; the cross-entropy knows none.
        chunk_size (`int`, defaults to 128): Positions of a chunk.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Both sums, 0-dim float32.

    Example:

    ```python
    >>> divergence, cross_entropy = chunked_divergence(hidden, hidden.detach(), targets, head, head)
    >>> float(divergence)
    0.0
    ```
    """

    def one(hidden: torch.Tensor, guide: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = student_head(hidden)  # (m, V)
        with torch.no_grad():
            log_p = F.log_softmax(teacher_head(guide) / temperature, dim=-1).to(logits.device)
        log_q = F.log_softmax(logits / temperature, dim=-1)
        # Where the teacher says never (-inf) the student's probability does not matter.
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        divergence = divergence.masked_fill(log_p == -torch.inf, 0.0).sum() * temperature**2
        return divergence, F.cross_entropy(logits, target, reduction="sum", ignore_index=-100)

    # Nothing to compare: zeros that hang on the student, so that every process has a backward pass.
    divergence = cross_entropy = 0.0 * student.float().sum()
    for start in range(0, student.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        chunk = student[part], teacher[part], targets[part]
        if torch.is_grad_enabled():
            sums = checkpoint(one, *chunk, use_reentrant=False)
        else:
            sums = one(*chunk)
        divergence, cross_entropy = divergence + sums[0], cross_entropy + sums[1]
    return divergence, cross_entropy
