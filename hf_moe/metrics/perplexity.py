"""Perplexity over any number of batches, each token weighing the same.

Loads by path too: `evaluate.load("<folder>/perplexity.py")`.
"""

import datasets
import evaluate
import numpy as np


__all__ = ["Perplexity"]

DESCRIPTION = """
Perplexity exp(L) with L the mean cross-entropy per token in nats. Every row (a token, sequence or batch) brings its
mean loss and the number of tokens it was taken over, so that sequences of different length weigh by their tokens.
Router losses are not part of it, unlike of the loss a Mixture-of-Experts model returns in training.
"""
INPUTS = """
Args:
    losses (list of float): mean cross-entropy of each row, in nats.
    num_tokens (list of int): tokens each mean was taken over; rows with 0 do not count.
Returns:
    perplexity (float), nll (float, nats per token), num_tokens (int).
Example:
    >>> Perplexity().compute(losses=[0.0, 1.3862943611198906], num_tokens=[1, 1])["perplexity"]
    2.0
"""


class Perplexity(evaluate.Metric):
    """exp of the mean cross-entropy per token.

    Inputs of `add_batch` and `compute`: `losses` and `num_tokens`, one per row;
    [`~hf_moe.metrics.token_losses`] makes both from logits and labels.

    Example:
        ```python
        metric = Perplexity()
        for batch in loader:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            metric.add_batch(**token_losses(logits, batch["labels"]))
        metric.compute()  # {"perplexity": ..., "nll": ..., "num_tokens": ...}
        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"losses": datasets.Value("float64"), "num_tokens": datasets.Value("int64")}),
        )

    # A combined evaluation hands every metric the inputs of all of them.
    def _compute(self, losses, num_tokens, **_inputs_of_others) -> dict[str, float]:
        tokens = np.asarray(num_tokens, dtype=np.int64)
        total = int(tokens.sum())
        if tokens.min(initial=0) < 0 or total == 0:
            raise ValueError(f"`num_tokens` must be counts with a sum above 0, got {tokens.tolist()[:10]}.")
        nll = float(np.asarray(losses, dtype=np.float64) @ tokens) / total
        with np.errstate(over="ignore"):  # beyond exp(709) the answer is infinity, not an exception
            return {"perplexity": float(np.exp(nll)), "nll": nll, "num_tokens": total}
