"""The contract of router starts: the first value of the `(N, D)` router matrix of each layer."""

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_moe.upcycling.feed_forward import FeedForwardSite


if TYPE_CHECKING:
    from hf_moe.upcycling.statistics import LayerStatistics


__all__ = ["RouterInit"]


class RouterInit:
    """How the router of a layer starts. Shapes: D hidden, N experts, K per token.

    Attributes:
        needs (`frozenset[str]`): Statistics that `build` reads, see [`LayerStatistics`].
        groups (`int`): Each row is repeated this many times in a row.
        uniform (`bool`): All experts start equally probable for every token.
        router_type (`str`, *optional*): Router the target must use; `None` leaves it to the weight rule.
    """

    needs: frozenset[str] = frozenset()
    groups: int = 1
    uniform: bool = False
    router_type: str | None = None

    @property
    def reads_text(self) -> bool:
        """Whether `prepare` needs a tokenizer."""
        return False

    def build(
        self,
        num_experts: int,
        hidden_size: int,
        stats: "LayerStatistics | None" = None,
        generator: torch.Generator | None = None,
        layer_idx: int = 0,
    ) -> torch.Tensor | None:
        """The router matrix of one layer.

        Args:
            num_experts (`int`): N.
            hidden_size (`int`): D.
            stats ([`LayerStatistics`], *optional*): What `needs` asked for.
            generator (`torch.Generator`, *optional*): CPU generator; the only source of randomness.
            layer_idx (`int`, defaults to 0): Index of the layer.

        Returns:
            `torch.Tensor` of shape `(N, D)`, float32; `None` for routers without a matrix.
        """
        raise TypeError(f"{type(self).__name__} must define `build`.")

    def validate(self, num_experts: int, top_k: int) -> None:
        """Refuses numbers of experts this start cannot serve.

        Raises:
            ValueError: names the argument, its value, what is allowed.
        """

    def prepare(self, model: Any, sites: list[FeedForwardSite], tokenizer: Any = None) -> "RouterInit":
        """Called once before the first layer; returns the start to use (starts that run the model do it here)."""
        return self

    def describe(self) -> dict[str, Any]:
        """Name and parameters, JSON-serialisable."""
        names = [f.name for f in fields(self)] if is_dataclass(self) else []
        return {"name": type(self).__name__, **{name: getattr(self, name) for name in names}}
