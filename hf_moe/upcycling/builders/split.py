"""Neuron split: the channels are dealt out to the experts (LLaMA-MoE 2406.16554, MoEfication 2110.01786)."""

from dataclasses import dataclass

import torch

from hf_moe.upcycling.clustering import balanced_kmeans
from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.statistics import required

from .base import ExpertBuilder


__all__ = ["Split", "even_width"]

METHODS = ("random", "kmeans", "coactivation", "importance")


@dataclass(frozen=True)
class Split(ExpertBuilder):
    """A partition of the channels into `N` experts of width I / N, so F = sum_e F_e. The whole of F needs every expert
    with the same weight: exact only for K = N and a router without preference. For K < N each expert counts N/K times
    as much, which keeps the mean of the output, not the function.

    Args:
        method (`str`, defaults to `"random"`): How channels find together.

            - `"random"`: uniformly;
            - `"kmeans"`: balanced k-means on the rows of W_u (LLaMA-MoE's clustering split);
            - `"coactivation"`: balanced k-means on which calibration tokens activate a channel, so that channels
              that fire together land in one expert (MoEfication). Needs `calibration`;
            - `"importance"`: channels sorted by |a_c dL/da_c| and dealt out in turns, so that all experts matter
              about equally. Needs `calibration`.

    Note: with weights that sum to 1 the factor is N; LLaMA-MoE writes it as N/K on the plain sum over the selected.
    """

    method: str = "random"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {self.method!r}.")

    @property
    def needs(self):
        return frozenset({"coactivation": {"activations"}, "importance": {"taylor"}}.get(self.method, ()))

    def expert_width(self, intermediate_size, num_experts):
        return even_width(intermediate_size, num_experts, "num_experts")

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        self.expert_width(ffn.intermediate_size, num_experts)
        parts = self.partition(ffn, num_experts, stats, generator)
        return [ffn.channels(part).with_down_bias_share(1 / num_experts) for part in parts]

    def partition(self, ffn, num_experts, stats=None, generator=None) -> list[torch.Tensor]:
        """The channels of each expert, sorted; a partition of all channels in equal parts."""
        size = ffn.intermediate_size
        if self.method == "random":
            return [p.sort().values for p in torch.randperm(size, generator=generator).chunk(num_experts)]
        if self.method == "importance":
            order = required(stats, "taylor", self).argsort(descending=True, stable=True)
            # There and back again (0 1 2 2 1 0 ...), so that no expert always gets the better one of a round.
            turn = torch.arange(size) // num_experts % 2
            seat = torch.arange(size) % num_experts
            seat = torch.where(turn == 0, seat, num_experts - 1 - seat)
            return [order[seat == e].sort().values for e in range(num_experts)]
        if self.method == "kmeans":
            features = ffn.up.float().cpu()
        else:
            active = required(stats, "activations", self).abs()  # (T, I)
            features = (active > active.mean(dim=-1, keepdim=True)).float().t()  # (I, T)
            features = features / features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        labels, _ = balanced_kmeans(features, num_experts, generator)
        return [(labels == e).nonzero().squeeze(-1) for e in range(num_experts)]

    def exactness(self, rule, top_k, num_experts, router=None):
        scale = num_experts / rule.typical_total(top_k, num_experts)
        if top_k < num_experts:
            reason = f"only {top_k} of the {num_experts} parts of the feed-forward are active"
            return Exactness(False, reason, scale)
        if router is None or not router.uniform:
            return Exactness(False, "the parts need equal weights, and this router start prefers some of them", scale)
        return Exactness(True, "every part is active with the same weight", scale)


def even_width(intermediate_size: int, parts: int, argument: str) -> int:
    """`intermediate_size / parts`.

    Raises:
        ValueError: not a whole number; the message suggests divisors.
    """
    if intermediate_size % parts:
        fits = [n for n in range(1, min(intermediate_size, 4 * parts) + 1) if intermediate_size % n == 0]
        raise ValueError(
            f"The {intermediate_size} channels of the feed-forward cannot be split in `{argument}` = {parts} equal "
            f"parts; use a divisor, such as {', '.join(map(str, fits[-6:]))}."
        )
    return intermediate_size // parts
