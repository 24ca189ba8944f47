"""Log-probabilities of a reference in the data, for data with images: TRL computes them beforehand for text alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader


__all__ = ["REFERENCE_COLUMNS", "WithReference", "add_reference_columns"]

#: What TRL calls them, chosen and rejected.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class WithReference:
    """A collator whose batches keep the reference's log-probabilities, where the rows have them.

    Args:
        collator (`Callable`): Makes batches of preferences with images.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in REFERENCE_COLUMNS if name in examples[0]]
        known = {name: torch.tensor([row[name] for row in examples]) for name in names}
        rows = [{key: value for key, value in row.items() if key not in known} for row in examples]
        return {**self.collator(rows), **known}


def add_reference_columns(
    dataset: Any,
    collator: Callable[[list[Any]], dict[str, Any]],
    reference: Callable[[dict[str, Any]], Sequence[torch.Tensor]],
    accelerator: Any,
    batch_size: int,
) -> Dataset:
    """A data set of preferences with the log-probabilities of a reference; the work is shared among processes.

    Args:
        dataset (`datasets.Dataset`): The rows.
        collator (`Callable`): Makes batches of them.
        reference (`Callable`): Log-probabilities `(chosen (B,), rejected (B,))` of a batch.
        accelerator (`Accelerator`): Of the trainer.
        batch_size (`int`): Rows per batch and process.

    Returns:
        `datasets.Dataset`: The rows with `ref_chosen_logps` and `ref_rejected_logps`.

    Raises:
        ValueError: a data set that is streamed.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`precompute_ref_log_probs=True` needs a `datasets.Dataset`, got a {type(dataset).__name__}. Load it "
            "without streaming, or set `precompute_ref_log_probs=False`."
        )
    loader: Any = accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=collator))  # type: ignore[arg-type]
    found = []
    for batch in loader:
        found.append(accelerator.gather_for_metrics(torch.stack(list(reference(batch)), 1)).float().cpu())
    values = torch.cat(found)
    columns = dict(zip(REFERENCE_COLUMNS, values.unbind(1), strict=True))
    return concatenate_datasets([dataset, Dataset.from_dict({k: v.tolist() for k, v in columns.items()})], axis=1)
