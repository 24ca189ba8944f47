"""Hash routing: the token id decides (Hash Layers, 2106.04426)."""

from dataclasses import dataclass

from hf_moe.routing.registry import list_routers

from .base import RouterInit


__all__ = ["Hash"]


@dataclass(frozen=True)
class Hash(RouterInit):
    """The router registered as `"hash"`, which has no matrix to start.

    Raises:
        ValueError: no router of that name is registered.
    """

    router_type = "hash"

    def __post_init__(self):
        if self.router_type not in list_routers():
            raise ValueError(
                f"`router=Hash()` needs a router registered as 'hash', but there are only {list_routers()}. Register "
                "one with `hf_moe.register_router`, or use Normal(0.02)."
            )

    def build(self, num_experts, hidden_size, stats=None, generator=None, layer_idx=0):
        return None
