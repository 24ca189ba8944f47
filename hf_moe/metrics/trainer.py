"""Perplexity for the stock `Trainer`, without keeping logits: two functions to pass to its constructor.

Shapes: B batch, S sequence, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from .losses import token_losses
from .perplexity import Perplexity


__all__ = ["causal_lm_metrics", "keep_token_losses"]


def keep_token_losses(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """`Trainer(preprocess_logits_for_metrics=...)`: reduces each sequence to its loss and its number of tokens.

    Args:
        logits (`torch.Tensor` of shape `(B, S, V)` or `tuple`): What the model returned besides the loss; a MoE
            model also returns its router logits and its auxiliary loss.
        labels (`torch.Tensor` of shape `(B, S)`): Token ids, -100 where nothing is predicted.

    Returns:
        `torch.Tensor` of shape `(B, 2)`: loss in nats per token, number of tokens.

    Raises:
        ValueError: no output is shaped like the logits of these labels.

    Example:
        ```python
        keep_token_losses(model(**batch).logits, batch["labels"])
        ```
    """
    outputs = logits if isinstance(logits, (tuple, list)) else (logits,)
    for output in outputs:
        if isinstance(output, torch.Tensor) and output.dim() == 3 and output.shape[:2] == labels.shape:
            rows = token_losses(output, labels)
            return torch.stack([rows["losses"].float(), rows["num_tokens"].float()], dim=-1)
    raise ValueError(
        f"`logits` holds nothing of shape (B, S, V) for labels of shape {tuple(labels.shape)}. These metrics are for "
        "causal language models."
    )


def causal_lm_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`Trainer(compute_metrics=...)`, together with [`keep_token_losses`]: perplexity and nll of the evaluation set.

    Unlike exp of the Trainer's `eval_loss` it weighs tokens, not batches, and holds no router loss.

    Args:
        prediction (`EvalPrediction`): Its `predictions` are what [`keep_token_losses`] returned, `(rows, 2)`.

    Returns:
        `dict`: `perplexity`, `nll`; the Trainer adds its prefix.

    Example:
        ```python
        Trainer(
            model=model,
            args=args,
            eval_dataset=held_out,
            preprocess_logits_for_metrics=keep_token_losses,
            compute_metrics=causal_lm_metrics,
        ).evaluate()["eval_perplexity"]
        ```
    """
    losses, num_tokens = np.asarray(prediction.predictions).T
    result: Any = Perplexity().compute(losses=losses, num_tokens=num_tokens.astype("int64"))
    return {"perplexity": result["perplexity"], "nll": result["nll"]}
