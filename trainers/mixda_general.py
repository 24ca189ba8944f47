"""The second stream of data: ordinary text beside a domain's."""

from collections.abc import Callable
from typing import Any

import torch


__all__ = ["GeneralText"]


class GeneralText:
    """Endless batches of a data set in an order that follows from the seed, so that a resumed run finds its place.

    Args:
        dataset: With a length and rows by number.
        collator (`Callable`): Makes a batch of rows.
        seed (`int`, defaults to 0): Of the order, which is another one in each round.

    Raises:
        TypeError: `dataset` has no length, or no rows by number.
        ValueError: `dataset` is empty.

    Example:

    ```python
    >>> GeneralText([{"text": "one"}, {"text": "two"}], list).batch(3, number=0)
    ```
    """

    def __init__(self, dataset: Any, collator: Callable, seed: int = 0):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"`general_dataset` must have a length and rows by number, got {type(dataset).__name__}. "
                "Collect the rows of a stream in a list."
            )
        if len(dataset) == 0:
            raise ValueError("`general_dataset` is empty.")
        self.dataset = dataset
        self.collator = collator
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, rows: int, number: int) -> dict[str, torch.Tensor]:
        """One batch; every row has its turn before one comes again.

        Args:
            rows (`int`): How many.
            number (`int`): Which batch, from 0 on.

        Returns:
            What the collator makes of the rows.
        """
        return self.collator([self.dataset[self.index(number * rows + i)] for i in range(rows)])

    def index(self, position: int) -> int:
        """The row at a position of the endless sequence."""
        round_number, place = divmod(position, len(self.dataset))
        if self._order[0] != round_number:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round_number)
            self._order = (round_number, torch.randperm(len(self.dataset), generator=generator).tolist())
        return self._order[1][place]
