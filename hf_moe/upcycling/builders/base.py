"""The contract of expert builders: one dense feed-forward in, `N` experts out.

Shapes: D hidden, I intermediate, N experts, K per token.
"""

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_moe.upcycling.exactness import Exactness
from hf_moe.upcycling.feed_forward import DenseFeedForward, FeedForwardSite
from hf_moe.upcycling.weight_rules import WeightRule


if TYPE_CHECKING:
    from hf_moe.upcycling.router_init.base import RouterInit
    from hf_moe.upcycling.statistics import LayerStatistics


__all__ = ["ExpertBuilder"]


class ExpertBuilder:
    """Turns the feed-forward of one layer into the experts of that layer.

    Builders are small frozen dataclasses: their fields are the recipe, written into the config and the model card.
    A new recipe is one file that overrides `build` and `exactness` (and `expert_width` where experts are narrower).

    Attributes:
        needs (`frozenset[str]`): Statistics that `build` reads: `"router_inputs"`, `"activations"`, `"taylor"`,
            `"contribution"` (see [`LayerStatistics`]).
    """

    needs: frozenset[str] = frozenset()
    #: Whether `prepare` looks at weights besides those of the dense feed-forwards.
    reads_models = False

    def build(
        self,
        ffn: DenseFeedForward,
        num_experts: int,
        stats: "LayerStatistics | None" = None,
        generator: torch.Generator | None = None,
        layer_idx: int = 0,
    ) -> list[DenseFeedForward]:
        """The experts of one layer, before any scale.

        Args:
            ffn ([`DenseFeedForward`]): The dense feed-forward. Tensors that stay the same may be returned as they are.
            num_experts (`int`): N.
            stats ([`LayerStatistics`], *optional*): What `needs` asked for.
            generator (`torch.Generator`, *optional*): CPU generator; the only source of randomness.
            layer_idx (`int`, defaults to 0): Index of the layer.

        Returns:
            `list[DenseFeedForward]`: `N` experts of equal shape.
        """
        raise TypeError(f"{type(self).__name__} must define `build`.")

    def exactness(
        self, rule: WeightRule, top_k: int, num_experts: int, router: "RouterInit | None" = None
    ) -> Exactness:
        """Predicts whether the layer is preserved, and the scale that belongs to the recipe.

        Args:
            rule ([`WeightRule`]): How selected experts are weighed.
            top_k (`int`): K.
            num_experts (`int`): N.
            router ([`RouterInit`], *optional*): How the router starts; the builder's own default if absent.

        Returns:
            [`Exactness`]
        """
        raise TypeError(f"{type(self).__name__} must define `exactness`.")

    def expert_width(self, intermediate_size: int, num_experts: int) -> int:
        """Intermediate size of one expert made from a feed-forward of width `intermediate_size`.

        Raises:
            ValueError: the width cannot be divided that way.
        """
        return intermediate_size

    def validate(self, num_experts: int, top_k: int) -> None:
        """Refuses numbers of experts the recipe cannot make.

        Raises:
            ValueError: names the argument, its value, what is allowed.
        """

    def prepare(self, model: Any, sites: list[FeedForwardSite]) -> "ExpertBuilder":
        """Called once before the first layer; returns the builder to use (builders that load models do it here)."""
        return self

    def carried(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights outside the upcycled feed-forwards, given the dense model's: where recipes average them."""
        return state_dict

    def fold_scale(self, expert: DenseFeedForward, scale: float) -> DenseFeedForward:
        """Multiplies an expert's output by `scale`."""
        return expert.scaled(scale)

    def default_router(self) -> "RouterInit":
        """Router start that fits this recipe."""
        from hf_moe.upcycling.router_init.random import Normal

        return Normal()

    def describe(self) -> dict[str, Any]:
        """Name and parameters, JSON-serialisable."""
        names = [f.name for f in fields(self)] if is_dataclass(self) else []
        return {"name": type(self).__name__, **{name: _plain(getattr(self, name)) for name in names}}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}"
    return getattr(value, "name_or_path", None) or type(value).__name__
