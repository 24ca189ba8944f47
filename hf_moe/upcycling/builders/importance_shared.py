"""MoEBERT: the most important channels go to every expert, the others are dealt out (2204.07675)."""

from dataclasses import dataclass

import torch

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.statistics import required

from .base import ExpertBuilder
from .copy import copies_exactness


__all__ = ["ImportanceShared"]

MEASURES = ("taylor", "contribution")


@dataclass(frozen=True)
class ImportanceShared(ExpertBuilder):
    """Channels sorted by importance: the first s belong to every expert, the others are dealt out one by one, so each
    expert has s + (I - s) / N channels (MoEBERT, Sec. 3.2). Of these `width` keeps the most important ones. b_d goes
    to every expert. Not the dense function unless every expert has all channels: the paper distils afterwards, see
    [`~hf_moe.trainers.MoEDistillationTrainer`].

    MoEBERT and COMET-BERT make 4 experts of BERT-base (I = 3072) with `ImportanceShared(512, width=768)`.

    Note: the paper sums the gradient over the tokens of a batch before it takes the absolute value, and over W_u too;
    here every token counts by itself, so that importances do not cancel.

    Args:
        shared (`int` or `float`): s, or its share of the channels as a float up to 1.0, which keeps all of them.
        measure (`str`, defaults to `"taylor"`): `"taylor"` |a_c dL/da_c| of the model's own loss, or
            `"contribution"` mean |a_c| times the norm of column c of W_d, which needs no gradient. Both need
            `calibration`; a classifier's loss needs it with `labels`.
        width (`int`, *optional*): Channels of one expert; what it is dealt by default.

    Example:

    ```python
    >>> batches = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    >>> moe, report = upcycle(
    ...     bert, num_experts=4, top_k=1, experts=ImportanceShared(512, width=768), calibration=batches
    ... )
    ```
    """

    shared: int | float
    measure: str = "taylor"
    width: int | None = None

    def __post_init__(self):
        if self.shared < 0:
            raise ValueError(f"`shared` must not be negative, got {self.shared}.")
        if isinstance(self.shared, float) and self.shared > 1:
            raise ValueError(f"`shared` must be a whole number of channels or a share up to 1.0, got {self.shared}.")
        if self.measure not in MEASURES:
            raise ValueError(f"`measure` must be one of {list(MEASURES)}, got {self.measure!r}.")
        if self.width is not None and self.width < max(1, self.shared if isinstance(self.shared, int) else 1):
            raise ValueError(
                f"`width` must be at least 1 and hold the shared channels ({self.shared}), got {self.width}."
            )

    @property
    def needs(self):
        return frozenset() if self.keeps_all else frozenset({self.measure})

    @property
    def keeps_all(self) -> bool:
        """Whether every expert has all channels."""
        return isinstance(self.shared, float) and self.shared == 1 and self.width is None

    def num_shared(self, intermediate_size: int) -> int:
        """s as a number of channels."""
        if isinstance(self.shared, float):
            return round(self.shared * intermediate_size)
        if self.shared >= intermediate_size:
            raise ValueError(
                f"`shared` must be below the {intermediate_size} channels there are, got {self.shared}; use "
                "`shared=1.0` to give all channels to every expert."
            )
        return self.shared

    def expert_width(self, intermediate_size, num_experts):
        shared = self.num_shared(intermediate_size)
        rest = intermediate_size - shared
        if self.width is not None:
            most = shared + rest // num_experts
            if not max(shared, 1) <= self.width <= most:
                raise ValueError(
                    f"`width` must be between the {shared} shared channels and {most}, what {num_experts} experts are "
                    f"dealt of {intermediate_size} channels, got {self.width}."
                )
            return self.width
        if rest % num_experts:
            raise ValueError(
                f"With `shared` = {shared} of {intermediate_size} channels, {rest} are left, which {num_experts} "
                f"experts cannot have in equal parts; use `shared={shared + rest % num_experts}`, or give `width`."
            )
        return shared + rest // num_experts

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        self.expert_width(ffn.intermediate_size, num_experts)
        if self.keeps_all:
            return [ffn] * num_experts
        return [ffn.channels(index) for index in self.deal(required(stats, self.measure, self), num_experts)]

    def deal(self, importance: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
        """Channels of each expert, the shared ones first, then those dealt to it by rank.

        Args:
            importance (`torch.Tensor` of shape `(I,)`): Importance of each channel.
            num_experts (`int`): N.

        Returns:
            `list[torch.Tensor]`: N index tensors.
        """
        order = importance.argsort(descending=True, stable=True)
        shared, rest = order.tensor_split([self.num_shared(len(order))])
        return [torch.cat([shared, rest[e::num_experts]])[: self.width] for e in range(num_experts)]

    def exactness(self, rule, top_k, num_experts, router=None):
        same = copies_exactness(rule, top_k, num_experts)
        if self.keeps_all:
            return same
        scale = 1.0 / rule.typical_total(top_k, num_experts)
        if num_experts == 1 and self.width is None:
            return Exactness(rule.total(1, 1) is not None, "one expert holds all channels", scale)
        return Exactness(False, "every expert lacks the channels that were dealt to the others", scale)
