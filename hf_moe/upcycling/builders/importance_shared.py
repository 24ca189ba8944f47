"""MoEBERT: the most important channels go to every expert, the others are dealt out (2204.07675)."""

from dataclasses import dataclass

import torch

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.statistics import required

from .base import ExpertBuilder


__all__ = ["ImportanceShared"]

MEASURES = ("taylor", "contribution")


@dataclass(frozen=True)
class ImportanceShared(ExpertBuilder):
    """Channels sorted by importance: the first s belong to every expert, the others are dealt out one by one, so each
    expert has s + (I - s) / N channels (MoEBERT, Sec. 3.2). Never the dense function: the paper distils afterwards.

    Args:
        shared (`int` or `float`): s, or its share of the channels if below 1.
        measure (`str`, defaults to `"taylor"`): `"taylor"` |a_c dL/da_c| of the language-model loss, or
            `"contribution"` mean |a_c| times the norm of column c of W_d, which needs no gradient. Both need
            `calibration`.
    """

    shared: int | float
    measure: str = "taylor"

    def __post_init__(self):
        if self.shared < 0:
            raise ValueError(f"`shared` must not be negative, got {self.shared}.")
        if self.measure not in MEASURES:
            raise ValueError(f"`measure` must be one of {list(MEASURES)}, got {self.measure!r}.")

    @property
    def needs(self):
        return frozenset({self.measure})

    def num_shared(self, intermediate_size: int) -> int:
        """s as a number of channels."""
        is_share = isinstance(self.shared, float) and self.shared < 1
        count = round(self.shared * intermediate_size) if is_share else int(self.shared)
        if count >= intermediate_size:
            raise ValueError(f"`shared` must be below the {intermediate_size} channels there are, got {self.shared}.")
        return count

    def expert_width(self, intermediate_size, num_experts):
        shared = self.num_shared(intermediate_size)
        rest = intermediate_size - shared
        if rest % num_experts:
            raise ValueError(
                f"With `shared` = {shared} of {intermediate_size} channels, {rest} are left, which {num_experts} "
                f"experts cannot have in equal parts; use `shared={shared + rest % num_experts}`."
            )
        return shared + rest // num_experts

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        self.expert_width(ffn.intermediate_size, num_experts)
        return [ffn.channels(index) for index in self.deal(required(stats, self.measure, self), num_experts)]

    def deal(self, importance: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
        """Channels of each expert, the shared ones first.

        Args:
            importance (`torch.Tensor` of shape `(I,)`): Importance of each channel.
            num_experts (`int`): N.

        Returns:
            `list[torch.Tensor]`: N index tensors.
        """
        order = importance.argsort(descending=True, stable=True)
        shared, rest = order.tensor_split([self.num_shared(len(order))])
        return [torch.cat([shared, rest[e::num_experts]]) for e in range(num_experts)]

    def exactness(self, rule, top_k, num_experts, router=None):
        scale = 1.0 / rule.typical_total(top_k, num_experts)
        if num_experts == 1:
            return Exactness(rule.total(1, 1) is not None, "one expert holds all channels", scale)
        return Exactness(False, "every expert lacks the channels that were dealt to the others", scale)
