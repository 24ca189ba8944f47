"""Which old unit each unit of a wider layer is a copy of, and how what leaves the copies is shared out."""

from dataclasses import dataclass

import torch


__all__ = ["ORDERS", "UnitMap", "grow_heads", "grow_units"]

ORDERS = ("cyclic", "random")


@dataclass(frozen=True)
class UnitMap:
    """g: new unit -> old unit.

    Args:
        index (`torch.Tensor` of shape `(new,)`): g; every old unit occurs.
        old (`int`): Number of old units.

    Example:

    ```python
    >>> UnitMap(torch.tensor([0, 1, 2, 0]), old=3).shares()  # what leaves unit 0 is halved
    tensor([0.5000, 1.0000, 1.0000, 0.5000])
    ```
    """

    index: torch.Tensor
    old: int

    @property
    def counts(self) -> torch.Tensor:
        """c: how often each old unit occurs, `(old,)`."""
        return torch.bincount(self.index, minlength=self.old)

    @property
    def is_identity(self) -> bool:
        """Whether nothing was added or moved."""
        return len(self.index) == self.old and torch.equal(self.index, torch.arange(self.old))

    @property
    def is_uniform(self) -> bool:
        """Whether every old unit occurs equally often: means over the units are then preserved."""
        return bool((self.counts == self.counts[0]).all())

    @property
    def added(self) -> torch.Tensor:
        """True at the units that are not the first copy of theirs, `(new,)`."""
        position = torch.arange(len(self.index))
        first = torch.full((self.old,), len(self.index)).scatter_reduce(0, self.index, position, "amin")
        return position != first[self.index]

    def blocks(self, size: int) -> "UnitMap":
        """The same map where every unit is a run of `size` coordinates, as a head is."""
        offsets = torch.arange(size)
        return UnitMap((self.index.unsqueeze(-1) * size + offsets).flatten(), self.old * size)

    @staticmethod
    def joined(*maps: "UnitMap") -> "UnitMap":
        """Maps side by side, as in a matrix that holds queries, keys and values."""
        index, old = [], 0
        for unit_map in maps:
            index.append(unit_map.index + old)
            old += unit_map.old
        return UnitMap(torch.cat(index), old)

    def shares(self) -> torch.Tensor:
        """1 / c(g(j)), `(new,)`: the shares of the copies of a unit sum to 1."""
        return 1.0 / self.counts[self.index]

    def uneven_shares(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Random positive shares, drawn anew for each of `rows` outputs, `(rows, new)`; those of the copies of a unit
        sum to 1.

        One share per copy would only scale the copies' gradients, and Adam divides such a scale away again.
        """
        drawn = 0.5 + torch.rand(rows, len(self.index), generator=generator, dtype=torch.float64)
        totals = torch.zeros(rows, self.old, dtype=torch.float64).index_add_(1, self.index, drawn)
        return (drawn / totals[:, self.index]).float()


def grow_units(old: int, new: int, order: str = "cyclic", generator: torch.Generator | None = None) -> UnitMap:
    """g(j) = j for the first `old` units; the others repeat them in turn, or in a random order.

    Note: bert2BERT draws the added units independently. Here a random order deals out every old unit once before any
    is dealt out again, because the residual stream keeps its norm only if all its coordinates occur equally often.

    Args:
        old (`int`): Units there are.
        new (`int`): Units there will be.
        order (`str`, defaults to `"cyclic"`): `"cyclic"` (left to right) or `"random"`.
        generator (`torch.Generator`, *optional*): For the random order.

    Returns:
        [`UnitMap`]
    """
    rounds = -(-new // old)
    if order == "random":
        drawn = [torch.randperm(old, generator=generator) for _ in range(rounds - 1)]
        return UnitMap(torch.cat([torch.arange(old), *drawn])[:new], old)
    return UnitMap(torch.arange(new) % old, old)


def grow_heads(
    heads: int,
    kv_heads: int,
    new_heads: int,
    new_kv_heads: int,
    order: str = "cyclic",
    generator: torch.Generator | None = None,
) -> tuple[UnitMap, UnitMap]:
    """Maps of query heads and of key-value heads. A query head is copied inside its own group only: elsewhere it
    would meet keys it was not trained with.

    Args:
        heads, kv_heads (`int`): Query and key-value heads there are.
        new_heads, new_kv_heads (`int`): Those there will be.
        order (`str`, defaults to `"cyclic"`): As in [`grow_units`].
        generator (`torch.Generator`, *optional*): For the random order.

    Returns:
        `tuple[UnitMap, UnitMap]`: Of query heads; of key-value heads.

    Raises:
        ValueError: the new heads cannot be dealt out evenly, or a group would lose heads.

    Example:

    ```python
    >>> grow_heads(4, 2, 8, 2)[0].index.tolist()
    [0, 1, 0, 1, 2, 3, 2, 3]
    ```
    """
    if new_heads % new_kv_heads:
        nearest = [n for n in range(heads, new_heads + new_kv_heads) if n % new_kv_heads == 0]
        raise ValueError(
            f"`num_attention_heads` must be a multiple of the {new_kv_heads} key-value heads, so that every group "
            f"gets as many, got {new_heads}. Use {' or '.join(map(str, nearest[-2:]))}."
        )
    group, new_group = heads // kv_heads, new_heads // new_kv_heads
    if new_kv_heads // kv_heads * new_group < group:
        raise ValueError(
            f"`num_attention_heads={new_heads}` with `num_key_value_heads={new_kv_heads}` leaves {new_group} query "
            f"heads to a group that has {group} now. Use at least "
            f"{-(-group // (new_kv_heads // kv_heads)) * new_kv_heads} heads, or leave out `num_key_value_heads`."
        )
    kv_map = grow_units(kv_heads, new_kv_heads, order, generator)
    of_group = kv_map.index.repeat_interleave(new_group)  # old group of every new query head
    index = torch.empty(new_heads, dtype=torch.long)
    for g in range(kv_heads):
        places = (of_group == g).nonzero().squeeze(-1)
        index[places] = g * group + grow_units(group, len(places), order, generator).index
    return UnitMap(index, heads), kv_map
