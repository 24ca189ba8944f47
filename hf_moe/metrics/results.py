"""Metric values as evaluation results of a model card."""

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any


__all__ = ["METRIC_NAMES", "evaluation_results"]

METRIC_NAMES = {
    "active_experts": "Active experts per token",
    "balance_violation": "Balance violation",
    "dead_share": "Share of dead experts",
    "marginal_entropy": "Entropy of the mean routing distribution (nats)",
    "max_violation": "Balance violation",
    "nll": "Cross-entropy (nats per token)",
    "perplexity": "Perplexity",
    "routing_entropy": "Routing entropy (nats)",
}


def evaluation_results(
    metrics: Mapping[str, Any],
    dataset_name: str,
    *,
    dataset_type: str | None = None,
    dataset_split: str | None = None,
    dataset_config: str | None = None,
    task_type: str = "text-generation",
    prefix: str = "eval_",
) -> list[dict[str, Any]]:
    """Keyword arguments of one `huggingface_hub.EvalResult` per number.

    Args:
        metrics (`Mapping[str, Any]`): From a metric's `compute`, `Trainer.evaluate` or `RoutingReport.metrics`. What
            is not a finite number is left out, and so are the Trainer's timing and epoch.
        dataset_name (`str`): Name a reader sees.
        dataset_type (`str`, *optional*): Hub id of the dataset; by default made from `dataset_name`.
        dataset_split (`str`, *optional*): Such as `"test"`.
        dataset_config (`str`, *optional*): Configuration of the dataset.
        task_type (`str`, defaults to `"text-generation"`): Hub task.
        prefix (`str`, defaults to `"eval_"`): Taken off the names.

    Returns:
        `list[dict]`: Accepted by `EvalResult(**result)`.

    Raises:
        ValueError: `dataset_name` is empty.

    Example:
        ```python
        results = evaluation_results(trainer.evaluate(), "WikiText-2", dataset_type="wikitext", dataset_split="test")
        ModelCardData(model_name="my-moe", eval_results=[EvalResult(**result) for result in results])
        ```
    """
    if not dataset_name:
        raise ValueError("`dataset_name` must name the data the metrics were measured on, got an empty string.")
    source = {
        "task_type": task_type,
        "dataset_type": dataset_type or re.sub(r"[^\w.-]+", "-", dataset_name).strip("-.").lower() or "custom",
        "dataset_name": dataset_name,
        "dataset_split": dataset_split,
        "dataset_config": dataset_config,
    }
    source = {key: value for key, value in source.items() if value is not None}
    results = []
    for key, value in metrics.items():
        name = key.removeprefix(prefix)
        if (
            not _is_number(value)
            or name == "epoch"
            or name.endswith(("_per_second", "runtime", "_time", "num_tokens"))
        ):
            continue
        results.append(
            {
                **source,
                "metric_type": name,
                "metric_name": METRIC_NAMES.get(name, name.replace("_", " ").capitalize()),
                "metric_value": round(float(value), 6),
            }
        )
    return results


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
