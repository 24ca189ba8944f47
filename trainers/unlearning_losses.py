"""Forget losses. Each returns a term on the forget batch and, if it is asked for, one on the retain batch.

Shapes: B batch, S sequence, V vocabulary, D hidden.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


__all__ = ["LOSSES", "UnlearningStep", "ga", "npo", "rmu", "sequence_log_probs", "token_cross_entropy"]


def token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of the next token over all labels that are not -100.

    Args:
        logits (`torch.Tensor` of shape `(B, S, V)`): Of the model.
        labels (`torch.Tensor` of shape `(B, S)`): Not shifted.
        reduction (`str`, defaults to `"mean"`): `"mean"`, `"sum"` or `"none"` (then `(B, S - 1)`).

    Returns:
        `torch.Tensor`
    """
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")  # (B, S - 1)
    if reduction == "none":
        return losses
    return losses.sum() / (labels[:, 1:] != -100).sum().clamp_min(1) if reduction == "mean" else losses.sum()


def sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's labels: `(B,)`. Arguments as in [`token_cross_entropy`]."""
    return -token_cross_entropy(logits, labels, "none").sum(dim=-1)


class UnlearningStep:
    """One pair of batches on its way through the model. Passes run when something of them is first asked for: a loss
    pays for what it uses; a forget loss of one's own gets one of these.

    Attributes:
        model (`nn.Module`): The model that trains.
        forget, retain (`dict[str, torch.Tensor]`): The batches, `(B, S)`; `retain` may be `None`.
        args ([`ExpertUnlearningConfig`]): The run's arguments.

    Example:

    ```python
    >>> def forget_loss(step):  # margin instead of the whole cross-entropy
    ...     return torch.relu(5.0 - step.forget_loss), step.retain_loss
    ```
    """

    def __init__(self, trainer: Any, model: nn.Module, forget: dict, retain: dict | None):
        self.trainer, self.model, self.args = trainer, model, trainer.args
        self.forget, self.retain = forget, retain

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of a pass of the model over a batch, `(B, S, V)`."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return self.model(**inputs, use_cache=False, **self.trainer.forward_options).logits

    @cached_property
    def forget_logits(self) -> torch.Tensor:
        """`(B, S, V)`; the anchor is read in this pass."""
        anchor = self.trainer.anchor
        with nullcontext() if anchor is None else anchor.reading():
            return self.logits(self.forget)

    @cached_property
    def retain_logits(self) -> torch.Tensor:
        """`(B, S, V)`."""
        if self.retain is None:
            raise ValueError(
                f"`retain_dataset` is needed by `forget_loss={self.args.forget_loss!r}` with `retain_weight="
                f"{self.args.retain_coefficient}`."
            )
        return self.logits(self.retain)

    @property
    def forget_loss(self) -> torch.Tensor:
        """Mean cross-entropy of the forget batch, CE_f."""
        return token_cross_entropy(self.forget_logits, self.forget["labels"])

    @property
    def retain_loss(self) -> torch.Tensor:
        """Mean cross-entropy of the retain batch, CE_r."""
        assert self.retain_logits is not None
        return token_cross_entropy(self.retain_logits, self.retain["labels"])  # type: ignore[index]

    @cached_property
    def reference_forget_logits(self) -> torch.Tensor:
        """As `forget_logits`, of the model as it was at the start; without gradient."""
        with self.trainer.reference() as reference:
            inputs = {name: self.forget[name] for name in ("input_ids", "attention_mask")}
            return reference(**inputs, use_cache=False, **self.trainer.forward_options).logits


def ga(step: UnlearningStep) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Gradient ascent: -CE_f. With a retain term (then called gradient difference), CE_r.

    Args:
        step ([`UnlearningStep`]): The batches.

    Returns:
        `tuple`: Forget term; function that computes the retain term.
    """
    return -step.forget_loss, lambda: step.retain_loss


def npo(step: UnlearningStep) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Negative preference optimization (arXiv 2404.05868): 2/beta E[log(1 + (pi(y|x) / pi_ref(y|x))^beta)], and CE_r.

    Args:
        step ([`UnlearningStep`]): The batches.

    Returns:
        `tuple`: As in [`ga`].
    """
    beta, labels = step.args.npo_beta, step.forget["labels"]
    reference = sequence_log_probs(step.reference_forget_logits, labels)
    ratio = sequence_log_probs(step.forget_logits, labels) - reference  # (B,)
    return 2.0 / beta * F.softplus(beta * ratio).mean(), lambda: step.retain_loss


def rmu(step: UnlearningStep) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Representation misdirection (arXiv 2403.03218): E_f ||h - c u||^2 / D, and E_r ||h - h_start||^2 / D, for hidden
    states h after one decoder layer and a random unit vector u that stays the same.

    Note: means over the D dimensions, as in RMU's own code; the papers' formula has sums.

    Args:
        step ([`UnlearningStep`]): The batches.

    Returns:
        `tuple`: As in [`ga`].
    """
    steering = step.trainer.steering

    def retain_term() -> torch.Tensor:
        batch: Any = step.retain
        with steering.reading(step.model) as hidden:
            assert step.retain_logits is not None
        with step.trainer.reference() as reference:
            start = steering.hidden_states(reference, batch, step.trainer.forward_options)
        return masked_mean((hidden.states - start).float().square(), batch["attention_mask"])

    with steering.reading(step.model) as hidden:
        assert step.forget_logits is not None
    target = steering.vector.to(hidden.states.device)
    return masked_mean((hidden.states.float() - target).square(), step.forget["attention_mask"]), retain_term


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over dimensions and over the tokens of `(B, S, D)` that are no padding."""
    return (values.mean(dim=-1) * mask).sum() / mask.sum().clamp_min(1)


#: Forget losses by their names in [`ExpertUnlearningConfig`].
LOSSES: dict[str, Callable] = {"ga": ga, "graddiff": ga, "npo": npo, "rmu": rmu}
