"""Virtual groups: fine-grained upcycling that starts from the dense function (NVIDIA, 2410.07524)."""

from dataclasses import dataclass

from hf_moe.upcycling.exactness import Exactness

from .base import ExpertBuilder
from .split import even_width


__all__ = ["VirtualGroups"]

SCALINGS = ("down", "sqrt", "cube_root")


@dataclass(frozen=True)
class VirtualGroups(ExpertBuilder):
    """The channels are cut in G shards and each shard is repeated r = N / G times; expert rep * G + g holds shard g.
    The router starts with r random rows, each repeated G times in a row, so a token that chooses one replica chooses
    all its shards: with K a multiple of G and renormalised weights every shard has total weight 1/G, and a factor G
    restores the dense output (2410.07524, Sec. 3). "E8G8T8" is G = 8, num_experts = 64, top_k = 8.

    Args:
        groups (`int`): G.
        scaling (`str`, defaults to `"down"`): Where the factor goes: `"down"` on W_d; `"sqrt"` its square root on W_u
            and W_d (exact for gated feed-forwards); `"cube_root"` its cube root on every matrix, as NVIDIA trained
            (exact only for squared ReLU; off at the start for SwiGLU).
    """

    groups: int
    scaling: str = "down"

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"`groups` must be at least 1, got {self.groups}.")
        if self.scaling not in SCALINGS:
            raise ValueError(f"`scaling` must be one of {list(SCALINGS)}, got {self.scaling!r}.")

    def validate(self, num_experts, top_k):
        if num_experts % self.groups:
            raise ValueError(
                f"`num_experts` must be a multiple of `groups` ({self.groups}) for virtual groups, got {num_experts}."
            )

    def expert_width(self, intermediate_size, num_experts):
        return even_width(intermediate_size, self.groups, "groups")

    def build(self, ffn, num_experts, stats=None, generator=None, layer_idx=0):
        width = self.expert_width(ffn.intermediate_size, num_experts)
        shards = [
            ffn.channels(range(g * width, (g + 1) * width)).with_down_bias_share(1 / self.groups)
            for g in range(self.groups)
        ]
        return shards * (num_experts // self.groups)

    def exactness(self, rule, top_k, num_experts, router=None):
        scale = self.groups / rule.typical_total(top_k, num_experts)
        if top_k % self.groups:
            reason = f"`top_k` ({top_k}) is not a multiple of `groups` ({self.groups}), so some shards are missing"
            return Exactness(False, reason, scale)
        if not self._keeps_replicas_together(router, top_k, num_experts):
            return Exactness(False, "the router does not start with equal rows for the shards of a replica", scale)
        if rule.total(top_k, num_experts) is None:
            reason = "softmax weights that are not renormalised sum to a value that depends on the token"
            return Exactness(False, reason, scale)
        if self.scaling == "cube_root" and scale != 1:
            return Exactness(False, "the cube root of the scale on every matrix is exact only for squared ReLU", scale)
        return Exactness(True, "every token gets all shards of the replicas it chooses, with equal weights", scale)

    def _keeps_replicas_together(self, router, top_k, num_experts) -> bool:
        if self.groups == 1 or router is None:
            return True
        if router.uniform:
            return top_k == num_experts
        # With rows repeated more than G times, a choice must still end between replicas.
        return router.groups % self.groups == 0 and top_k % router.groups == 0

    def fold_scale(self, expert, scale):
        if self.scaling == "sqrt":
            if not expert.gated:
                raise ValueError('`scaling="sqrt"` is for gated feed-forwards; use "down".')
            root = scale**0.5
            return expert.scaled_parts(up=root, down=root, down_bias=scale)
        if self.scaling == "cube_root":
            root = scale ** (1 / 3)
            return expert.scaled_parts(gate=root, up=root, down=root, down_bias=scale)
        return expert.scaled(scale)

    def default_router(self):
        from hf_moe.upcycling.router_init.random import Repeated

        return Repeated(self.groups)
