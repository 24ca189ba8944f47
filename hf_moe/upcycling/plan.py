"""What one upcycling run has decided, and the one place where a layer is made from it.

Shapes: D hidden, I intermediate, N experts, K per token.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .builders.base import ExpertBuilder
from .exactness import Exactness
from .feed_forward import DenseFeedForward
from .router_init.base import RouterInit
from .statistics import LayerStatistics
from .weight_rules import WeightRule


if TYPE_CHECKING:
    from .targets.base import Target


__all__ = ["RouterStart", "UpcyclePlan", "UpcycledLayer", "build_layer"]


class RouterStart(NamedTuple):
    """First values of a router.

    Args:
        weight (`torch.Tensor` of shape `(M, D)`, *optional*): One row per routing target: the N experts and, where the
            target has them, zero-computation experts.
        bias (`torch.Tensor` of shape `(M,)`, *optional*): Where the target's router has one.
        extra (`dict[str, torch.Tensor]`, *optional*): Further weights of the block, by name within it.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    extra: dict[str, torch.Tensor] | None = None


class UpcycledLayer(NamedTuple):
    """All new weights of one layer, scales folded in.

    Args:
        name (`str`): Module path of the dense feed-forward it replaces.
        layer_name (`str`): Module path of the layer.
        layer_idx (`int`): Index of the layer.
        router ([`RouterStart`]): Router.
        experts (`list[DenseFeedForward]`): N experts of equal shape.
        shared ([`DenseFeedForward`], *optional*): What every token passes through.
        residual ([`DenseFeedForward`], *optional*): Dense branch beside the experts.
        scale (`float`): Factor that was folded into the experts.
    """

    name: str
    layer_name: str
    layer_idx: int
    router: RouterStart
    experts: list[DenseFeedForward]
    shared: DenseFeedForward | None
    residual: DenseFeedForward | None
    scale: float


@dataclass(frozen=True)
class UpcyclePlan:
    """The decisions of one run: sizes, recipe, prediction. Holds no weights.

    Args:
        source (`str`): Name of the dense model.
        source_config: Its config.
        num_layers (`int`): Layers it has.
        layers (`tuple[int, ...]`): Those that become MoE layers.
        modules (`tuple[str, ...]`): Paths of their feed-forwards, relative to the base model.
        form ([`DenseFeedForward`]): A feed-forward of the model, for its sizes and form (may be on the meta device).
        num_experts (`int`): N.
        top_k (`int`): K.
        experts ([`ExpertBuilder`]): How experts are made.
        shared (`str` or `float`, *optional*): `"dense"`, `"residual"`, or the share of the channels all tokens use.
        router ([`RouterInit`]): How routers start.
        rule ([`WeightRule`]): How selected experts are weighed.
        scale (`str` or `float`): `"auto"` or the factor itself.
        seed (`int`): Seed of everything random.
        overrides (`dict`): Config fields set by the caller.
    """

    source: str
    source_config: Any
    num_layers: int
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    form: DenseFeedForward
    num_experts: int
    top_k: int
    experts: ExpertBuilder
    shared: str | float | None
    router: RouterInit
    rule: WeightRule
    scale: str | float = "auto"
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def all_layers(self) -> bool:
        """Whether every layer becomes a MoE layer."""
        return self.layers == tuple(range(self.num_layers))

    @property
    def dense_layers(self) -> list[int]:
        """Layers that keep their dense feed-forward."""
        return [i for i in range(self.num_layers) if i not in self.layers]

    @property
    def split_share(self) -> float | None:
        """Share of the channels that goes to a shared expert, if any."""
        return None if self.shared is None or isinstance(self.shared, str) else float(self.shared)

    @property
    def shared_width(self) -> int:
        """Width of the shared expert, 0 without one."""
        if self.shared == "dense":
            return self.form.intermediate_size
        if self.split_share is None:
            return 0
        return round(self.split_share * self.form.intermediate_size)

    @property
    def expert_width(self) -> int:
        """Width of a routed expert."""
        rest = self.form.intermediate_size - (self.shared_width if self.split_share is not None else 0)
        return self.experts.expert_width(rest, self.num_experts)

    @property
    def exactness(self) -> Exactness:
        """The prediction, for the scale that will be used."""
        prediction = self.experts.exactness(self.rule, self.top_k, self.num_experts, self.router)
        if self.shared == "dense":
            if self.scale == "auto":
                reason = "the shared expert is the dense feed-forward and the routed experts start at zero"
                return Exactness(True, reason, prediction.scale)
            reason = f"routed experts of scale {self.scale:g} start beside the dense feed-forward"
            return Exactness(False, reason, float(self.scale))
        if self.scale == "auto":
            return prediction
        scale = float(self.scale)
        if prediction.exact and abs(scale - prediction.scale) > 1e-6 * prediction.scale:
            reason = f"the scale is {scale:g}, and an exact start needs {prediction.scale:g}"
            return Exactness(False, reason, scale)
        return prediction._replace(scale=scale)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        form, width = self.form, self.expert_width
        matrices = 2 + form.gated
        biases = sum(b is not None for b in (form.gate_bias, form.up_bias)) * width
        return matrices * width * form.hidden_size + biases + (form.hidden_size if form.down_bias is not None else 0)

    def generator(self, layer_idx: int) -> torch.Generator:
        """Generator of one layer: a layer comes out the same whichever other layers are made."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + layer_idx * 7_919) % 2**63)

    def provenance(self, exactness: Exactness) -> dict[str, Any]:
        """What the config of the result records."""
        from hf_moe import __version__

        return {
            "source": self.source,
            "source_model_type": self.source_config.model_type,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "layers": list(self.layers),
            "experts": self.experts.describe(),
            "router": self.router.describe(),
            "shared": self.shared,
            "weights": self.rule.name,
            "scale": exactness.scale,
            "seed": self.seed,
            "predicted_exact": exactness.exact,
            "reason": exactness.reason,
            "hf_moe_version": __version__,
        }


def build_layer(
    plan: UpcyclePlan,
    target: "Target",
    config: Any,
    ffn: DenseFeedForward,
    name: str,
    layer_name: str,
    layer_idx: int,
    stats: LayerStatistics | None = None,
) -> UpcycledLayer:
    """Makes one MoE layer from one dense feed-forward.

    Args:
        plan ([`UpcyclePlan`]): The decisions.
        target ([`Target`]): What the result will be; may add to the router.
        config: Config of the result.
        ffn ([`DenseFeedForward`]): The dense feed-forward.
        name, layer_name, layer_idx: Where it sits.
        stats ([`LayerStatistics`], *optional*): Calibration statistics of this layer.

    Returns:
        [`UpcycledLayer`]
    """
    generator = plan.generator(layer_idx)
    shared, routed, routed_stats = None, ffn, stats
    if plan.shared == "dense":
        shared = ffn
    elif plan.split_share is not None:
        first, rest = _split_shared(plan, ffn, stats, generator)
        shared = ffn.channels(first)
        routed = ffn.channels(rest).with_down_bias_share(0)  # b_d is in the shared part
        routed_stats = None if stats is None else stats.channels(rest)
    experts = plan.experts.build(routed, plan.num_experts, routed_stats, generator, layer_idx)
    rows = plan.router.build(plan.num_experts, ffn.hidden_size, stats, generator, layer_idx)
    router = target.start_router(config, plan, rows, stats, generator, layer_idx)
    scale = _scale(plan, router, stats)
    if plan.shared == "dense" and plan.scale == "auto":
        experts = [expert.silenced() for expert in experts]
    else:
        # Copies stay one tensor: scale each distinct expert once.
        scaled = {id(expert): plan.experts.fold_scale(expert, scale) for expert in experts}
        experts = [scaled[id(expert)] for expert in experts]
    residual = ffn if plan.shared == "residual" else None
    return UpcycledLayer(name, layer_name, layer_idx, router, experts, shared, residual, scale)


def _split_shared(plan, ffn, stats, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of the shared expert (the most important ones, where that was measured) and the others."""
    importance = None if stats is None else stats.importance.get("taylor", stats.importance.get("contribution"))
    if importance is None:
        order = torch.randperm(ffn.intermediate_size, generator=generator)
    else:
        order = importance.argsort(descending=True, stable=True)
    first, rest = order.tensor_split([plan.shared_width])
    return first.sort().values, rest.sort().values


def _scale(plan: UpcyclePlan, router: RouterStart, stats: LayerStatistics | None) -> float:
    """The plan's scale; where the sum of the weights depends on the token, corrected by its measured mean."""
    scale = plan.exactness.scale
    inputs = None if stats is None else stats.router_inputs
    if plan.scale != "auto" or plan.rule.total(plan.top_k, plan.num_experts) is not None:
        return scale
    if inputs is None or router.weight is None:
        return scale
    logits = torch.nn.functional.linear(inputs, router.weight.float(), router.bias)
    weights, index = plan.rule.apply(logits, plan.top_k)
    # Slots of zero-computation experts carry nothing of the feed-forward.
    mean = float((weights * (index < plan.num_experts)).sum(dim=-1).mean())
    return scale * plan.rule.typical_total(plan.top_k, plan.num_experts) / mean
