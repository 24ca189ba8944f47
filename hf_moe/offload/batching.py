"""Which requests run together when each needs one expert."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any


__all__ = ["form_batch", "queues_by_expert"]


def queues_by_expert(requests: Iterable[tuple[Any, Hashable]]) -> dict[Hashable, list[Any]]:
    """Sorts requests into one queue per expert, in the order they came.

    Args:
        requests (`Iterable[tuple]`): Pairs of a request and the expert it needs next.

    Returns:
        `dict[Hashable, list]`

    Example:
        ```python
        queues_by_expert([("a", 0), ("b", 1), ("c", 0)])  # {0: ["a", "c"], 1: ["b"]}
        ```
    """
    queues: dict[Hashable, list[Any]] = {}
    for request, expert in requests:
        queues.setdefault(expert, []).append(request)
    return queues


def form_batch(queues: Mapping[Hashable, Sequence[Any]], max_size: int) -> tuple[list[Any], dict[Hashable, list[Any]]]:
    """Fills a batch from the longest queues, so that few different experts are needed (Read-ME, 2410.19123, Alg. 2).

    While there is room: the longest queue, of equally long ones the first, gives as many requests as fit, oldest
    first. A short queue can so be passed over for as long as longer ones keep coming; whoever serves requests with
    deadlines should put overdue ones into the batch first.

    Note: the paper's pseudo-code keeps an index of a queue that has run empty, and does not end when all have.

    Args:
        queues (`Mapping[Hashable, Sequence]`): Requests per expert, oldest first; not changed.
        max_size (`int`): Requests per batch.

    Returns:
        `tuple[list, dict]`: The batch, and what is left, without empty queues.

    Raises:
        ValueError: `max_size` below 1.

    Example:
        ```python
        form_batch({0: ["a", "b", "c"], 1: ["d", "e"], 2: ["f"]}, max_size=4)
        # (["a", "b", "c", "d"], {1: ["e"], 2: ["f"]})
        ```
    """
    if max_size < 1:
        raise ValueError(f"`max_size` must be at least 1, got {max_size}.")
    left = {expert: list(requests) for expert, requests in queues.items() if requests}
    batch: list[Any] = []
    while left and len(batch) < max_size:
        expert = max(left, key=lambda name: len(left[name]))
        taken = min(max_size - len(batch), len(left[expert]))
        batch += left[expert][:taken]
        left[expert] = left[expert][taken:]
        if not left[expert]:
            del left[expert]
    return batch, left
