"""Hash routing: the token id decides (Hash Layers, 2106.04426)."""

from dataclasses import dataclass

from .base import RouterInit


__all__ = ["Hash"]


@dataclass(frozen=True)
class Hash(RouterInit):
    """The router `"hash"`, whose table of token ids is drawn at random; it has no matrix to start.

    Weights are 1/K for every token, so upcycling by copies computes the dense function whatever the table is.
    """

    router_type = "hash"

    def build(self, num_experts, hidden_size, stats=None, generator=None, layer_idx=0):
        return None
