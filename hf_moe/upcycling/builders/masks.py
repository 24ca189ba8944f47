"""Experts that keep part of the channels, by given masks or by activity per domain (Read-ME, 2410.19123)."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.feed_forward import DenseFeedForward

from .base import ExpertBuilder
from .copy import copies_exactness


__all__ = ["Masks"]


@dataclass(frozen=True)
class Masks(ExpertBuilder):
    """Expert e keeps the channels M_e of the dense feed-forward: F_e(x) = sum over c in M_e of W_d[:, c] a_c(x), with
    no scaling (Read-ME, Sec. 3). All experts must keep equally many channels, so that they stack.

    Args:
        masks (`torch.Tensor` or `dict`, *optional*): Boolean, `(N, I)` for every layer, or one such tensor per layer
            index. See [`Masks.from_activity`] for the paper's masks.
        keep (`float`, defaults to 1.0): Without `masks`: share of the channels that every expert keeps, drawn at
            random per expert. 1 gives copies.
    """

    masks: Any = None
    keep: float = 1.0

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` must be above 0 and at most 1, got {self.keep}.")
        if self.masks is not None:
            layers = self.masks.values() if isinstance(self.masks, dict) else [self.masks]
            widths = set()
            for mask in layers:
                if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
                    raise ValueError("`masks` must be boolean tensors of shape (num_experts, intermediate_size).")
                widths |= set(mask.sum(dim=-1).tolist())
            if len(widths) != 1 or 0 in widths:
                raise ValueError(
                    f"Every mask must keep the same number of channels, at least 1; got {sorted(widths)}."
                )

    @classmethod
    def from_activity(cls, activity: torch.Tensor | dict[int, torch.Tensor], keep: int) -> "Masks":
        """The paper's masks: the `keep` channels with the largest mean |a_c| on the texts of each domain.

        Args:
            activity (`torch.Tensor` of shape `(N, I)` or `dict`): Mean |a_c| per domain, per layer index if a dict.
            keep (`int`): Channels an expert keeps.

        Returns:
            [`Masks`]

        Raises:
            ValueError: `keep` is not between 1 and I.
        """

        def mask(values: torch.Tensor) -> torch.Tensor:
            if not 1 <= keep <= values.shape[-1]:
                raise ValueError(f"`keep` must be between 1 and the {values.shape[-1]} channels, got {keep}.")
            top = values.topk(keep, dim=-1).indices
            return torch.zeros_like(values, dtype=torch.bool).scatter(-1, top, True)

        if isinstance(activity, dict):
            return cls({layer: mask(values) for layer, values in activity.items()})
        return cls(mask(activity))

    @property
    def keeps_all(self) -> bool:
        """Whether no channel is dropped anywhere."""
        if self.masks is None:
            return self.keep == 1
        layers = self.masks.values() if isinstance(self.masks, dict) else [self.masks]
        return all(bool(mask.all()) for mask in layers)

    def validate(self, num_experts, top_k):
        layers = [] if self.masks is None else self.masks.values() if isinstance(self.masks, dict) else [self.masks]
        for mask in layers:
            if mask.shape[0] != num_experts:
                raise ValueError(f"`masks` are for {mask.shape[0]} experts, but `num_experts` is {num_experts}.")

    def expert_width(self, intermediate_size, num_experts):
        if self.masks is None:
            return max(1, round(self.keep * intermediate_size))
        mask = next(iter(self.masks.values())) if isinstance(self.masks, dict) else self.masks
        if mask.shape[1] != intermediate_size:
            raise ValueError(f"`masks` are for {mask.shape[1]} channels, the feed-forward has {intermediate_size}.")
        return int(mask[0].sum())

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        width = self.expert_width(ffn.intermediate_size, num_experts)
        if self.keeps_all:
            return [ffn] * num_experts
        if self.masks is None:
            keep = [torch.randperm(ffn.intermediate_size, generator=generator)[:width] for _ in range(num_experts)]
            return [_kept(ffn, index) for index in keep]
        if isinstance(self.masks, dict) and layer_idx not in self.masks:
            raise ValueError(f"`masks` has no entry for layer {layer_idx}; it has {sorted(self.masks)}.")
        masks = self.masks[layer_idx] if isinstance(self.masks, dict) else self.masks
        return [_kept(ffn, mask.nonzero().squeeze(-1)) for mask in masks]

    def exactness(self, rule, top_k, num_experts, router=None):
        same = copies_exactness(rule, top_k, num_experts)
        if self.keeps_all:
            return same
        return Exactness(False, "every expert keeps only part of the channels", same.scale)

    def describe(self):
        shape = None
        if self.masks is not None:
            shape = "per layer" if isinstance(self.masks, dict) else "one for all layers"
        return {"name": "Masks", "masks": shape, "keep": self.keep}


def _kept(ffn: DenseFeedForward, index: torch.Tensor) -> DenseFeedForward:
    return ffn.channels(index.sort().values)
