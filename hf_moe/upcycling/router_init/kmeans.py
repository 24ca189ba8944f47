"""Router rows from clusters of what the router will see (LLaMA-MoE v2, 2411.15708)."""

from dataclasses import dataclass

from hf_moe.upcycling.clustering import balanced_kmeans
from hf_moe.upcycling.statistics import required

from .base import RouterInit


__all__ = ["KMeans"]


@dataclass(frozen=True)
class KMeans(RouterInit):
    """Balanced k-means on the router's inputs of the calibration text, one cluster per expert.

    Note: hidden states of language models share a large common part, which would fill every row and decide nothing;
    `center` removes the mean of the centroids. Rows are then scaled alike, so that their mean norm is `norm`.

    Args:
        center (`bool`, defaults to `True`): Subtract the mean of the centroids.
        norm (`float`, defaults to 1.0): Mean norm of the rows.
        max_points (`int`, defaults to 4096): Calibration tokens that are clustered, at most.
    """

    center: bool = True
    norm: float = 1.0
    max_points: int = 4096

    needs = frozenset({"router_inputs"})

    def __post_init__(self):
        if not self.norm > 0:
            raise ValueError(f"`norm` must be above 0, got {self.norm}.")
        if self.max_points < 1:
            raise ValueError(f"`max_points` must be at least 1, got {self.max_points}.")

    def build(self, num_experts, hidden_size, stats=None, generator=None, layer_idx=0):
        _, rows = balanced_kmeans(required(stats, "router_inputs", self)[: self.max_points], num_experts, generator)
        if self.center and num_experts > 1:
            rows = rows - rows.mean(dim=0)
        return rows * (self.norm / rows.norm(dim=-1).mean().clamp_min(1e-12))
