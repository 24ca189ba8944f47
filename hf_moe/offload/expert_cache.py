"""Which experts stay in fast memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any


__all__ = ["POLICIES", "ExpertCache", "count_hits"]

POLICIES = ("belady", "lru")


class ExpertCache:
    """A fixed number of places for experts.

    `"lru"` gives up the expert that was not used for longest. `"belady"` gives up the one whose next use is farthest
    away, which no policy beats; it must be told what is to come, as a router that runs ahead of the layers can
    (Read-ME, 2410.19123, Sec. 4: `model(input_ids, routing_only=True)`). Of experts that will not be used again, or
    where nothing is known to come, as while text is being generated, it gives up the least recently used.

    Args:
        capacity (`int`): Places.
        policy (`str`, defaults to `"lru"`): `"lru"` or `"belady"`.
        load (`Callable`, *optional*): Called with an expert that is not there; what it returns is kept.

    Raises:
        ValueError: `capacity` below 1, or another policy.

    Example:
        ```python
        cache = ExpertCache(2, "belady", load=lambda expert: weights[expert].to("cuda"))
        for position, expert in enumerate(experts):
            cache.fetch(expert, upcoming=experts[position + 1 :])
        cache.hit_rate
        ```
    """

    def __init__(self, capacity: int, policy: str = "lru", load: Callable[[Any], Any] | None = None):
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"`capacity` must be a whole number of at least 1, got {capacity!r}.")
        if policy not in POLICIES:
            raise ValueError(f"`policy` must be one of {list(POLICIES)}, got {policy!r}.")
        self.capacity = capacity
        self.policy = policy
        self.load = load
        self.hits = self.misses = 0
        self._experts: OrderedDict[Hashable, Any] = OrderedDict()  # least recently used first

    def fetch(self, expert: Hashable, upcoming: Sequence[Hashable] = ()) -> Any:
        """The expert, loaded if it is not there.

        Args:
            expert (`Hashable`): Such as an index, or a pair of layer and index.
            upcoming (`Sequence[Hashable]`): The experts that will be asked for after this one, in order, as far as
                known; read by `"belady"`.

        Returns:
            What `load` returned for it; `None` without `load`.
        """
        if expert in self._experts:
            self.hits += 1
        else:
            self.misses += 1
            value = None if self.load is None else self.load(expert)  # a failure to load changes nothing
            if len(self._experts) >= self.capacity:
                del self._experts[self._victim(upcoming)]
            self._experts[expert] = value
        self._experts.move_to_end(expert)
        return self._experts[expert]

    def _victim(self, upcoming: Sequence[Hashable]) -> Hashable:
        left = dict.fromkeys(self._experts)
        if self.policy == "belady":
            for expert in upcoming:
                if len(left) == 1:
                    break
                left.pop(expert, None)
        return next(iter(left))

    @property
    def resident(self) -> tuple[Hashable, ...]:
        """The experts that are there, least recently used first."""
        return tuple(self._experts)

    @property
    def hit_rate(self) -> float:
        """Share of the calls of `fetch` that found their expert; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


def count_hits(references: Iterable[Hashable], capacity: int, policy: str = "lru") -> int:
    """How often a cache finds its expert on a known sequence.

    Args:
        references (`Iterable[Hashable]`): Experts in the order they are asked for.
        capacity (`int`), policy (`str`): See [`ExpertCache`].

    Returns:
        `int`

    Example:
        ```python
        count_hits([0, 1, 2, 0, 1, 3] * 2, capacity=2, policy="belady")  # 3
        ```
    """
    sequence, cache = list(references), ExpertCache(capacity, policy)
    for position, expert in enumerate(sequence):
        cache.fetch(expert, sequence[position + 1 :])
    return cache.hits
