"""Which experts work together, and which tokens an expert is for.

Shapes: T tokens, N experts, K per token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


__all__ = ["CoActivation", "TokenExpertCounts", "TypicalToken"]


class CoActivation:
    """C_ij: tokens that experts i and j both processed; C_ii is the number of tokens of expert i."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.counts = torch.zeros(num_experts, num_experts, dtype=torch.int64)

    def update(self, top_k_index: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts, N on empty slots; no padding.
        """
        used = torch.zeros(top_k_index.shape[0], self.num_experts + 1)
        used = used.scatter_(1, top_k_index, 1.0)[:, :-1]  # (T, N); the last column held the empty slots
        # Exact: float32 counts to 2^24, more than any batch has tokens.
        self.counts += (used.T @ used).long()


class TypicalToken(NamedTuple):
    """A token id that one expert receives more often than others do.

    Args:
        token_id (`int`): The token.
        count (`int`): How often this expert received it.
        share (`float`): `count` / occurrences of the token.
    """

    token_id: int
    count: int
    share: float


class TokenExpertCounts:
    """n_te: how often expert e received token t. Memory grows with the distinct pairs, not with the text."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self._keys = torch.zeros(0, dtype=torch.int64)  # token * N + expert, sorted
        self._counts = torch.zeros(0, dtype=torch.int64)

    def update(self, token_ids: torch.Tensor, top_k_index: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            token_ids (`torch.Tensor` of shape `(T,)`): Input ids; no padding.
            top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts, N on empty slots.
        """
        keys = token_ids.unsqueeze(-1) * self.num_experts + top_k_index  # (T, K)
        self.add(*keys[top_k_index < self.num_experts].unique(return_counts=True))

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What [`add`] takes: keys (token id times N plus expert) and their counts, both `(M,)`."""
        return self._keys, self._counts

    def add(self, keys: torch.Tensor, counts: torch.Tensor) -> None:
        """Adds counted pairs.

        Args:
            keys (`torch.Tensor` of shape `(M,)`): Token id times N plus expert, no key twice.
            counts (`torch.Tensor` of shape `(M,)`): How often.
        """
        self._keys, place = torch.cat([self._keys, keys]).unique(return_inverse=True)
        total = torch.zeros(self._keys.shape[0], dtype=torch.int64)
        self._counts = total.scatter_add_(0, place, torch.cat([self._counts, counts]))

    def by_class(self, class_of: Mapping[int, str], names: Sequence[str]) -> torch.Tensor:
        """How often each expert received tokens of each class.

        Args:
            class_of (`Mapping[int, str]`): Class of every token id that was seen.
            names (`Sequence[str]`): The classes.

        Returns:
            `torch.Tensor` of shape `(C, N)`, int64, in the order of `names`.
        """
        ids, place = (self._keys // self.num_experts).unique(return_inverse=True)
        rows = torch.tensor([names.index(class_of[i]) for i in ids.tolist()], dtype=torch.int64)[place]
        counts = torch.zeros(len(names), self.num_experts, dtype=torch.int64)
        return counts.index_put_((rows, self._keys % self.num_experts), self._counts, accumulate=True)

    def typical(self, occurrences: torch.Tensor, limit: int, min_count: int = 3) -> list[list[TypicalToken]]:
        """The tokens that say most about each expert: largest n_te log(P(e|t) / P(e)) among those it prefers.

        The sum of this over all tokens and experts is T times the mutual information of token and expert, so frequent
        *and* specific tokens come first.

        Args:
            occurrences (`torch.Tensor` of shape `(V,)`): How often each token id was seen.
            limit (`int`): Tokens per expert at most.
            min_count (`int`, defaults to 3): Rarer pairs are left to chance.

        Returns:
            `list[list[TypicalToken]]`: One list per expert, best first; empty for an expert without preferences.
        """
        token, expert = self._keys // self.num_experts, self._keys % self.num_experts
        share = self._counts / occurrences[token]  # P(e|t)
        received = torch.zeros(self.num_experts, dtype=torch.int64).scatter_add_(0, expert, self._counts)
        base = received / occurrences.sum()  # P(e)
        score = self._counts * (share / base[expert]).log()
        score = score.masked_fill(self._counts < min_count, -math.inf)
        found = []
        for e in range(self.num_experts):
            mine = torch.nonzero((expert == e) & (score > 1e-9)).squeeze(-1)
            best = mine[score[mine].argsort(descending=True, stable=True)[:limit]]
            found.append([TypicalToken(int(token[i]), int(self._counts[i]), float(share[i])) for i in best])
        return found
