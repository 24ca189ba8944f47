"""Targets of this package: `moe_llama`, `moe_qwen2`, `moe_qwen3`, `moe_gpt2`, `moe_bert`, `moe_roberta`,
`moe_t5` and `moe_plus_plus`.

Shapes: D hidden, I expert width, N experts, Z zero-computation experts, K per token.
"""

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from hf_moe.routing.registry import build_router
from hf_moe.upcycling.feed_forward import DenseFeedForward
from hf_moe.upcycling.plan import RouterStart, UpcycledLayer, UpcyclePlan
from hf_moe.upcycling.router_init.random import Normal
from hf_moe.upcycling.statistics import required

from .base import CheckpointTarget


__all__ = ["BackboneTarget", "MoePlusPlusTarget", "backbone_targets"]

# Router and its options for each weight rule.
ROUTERS = {
    "renormalise": ("softmax_topk", {"norm_topk_prob": True}),
    "softmax": ("softmax_topk", {"norm_topk_prob": False}),
    "sigmoid": ("sigmoid_topk", {"norm_topk_prob": True}),
}


class BackboneTarget(CheckpointTarget):
    """A backbone of this package: any layers, any registered router, every kind of shared expert.

    Args:
        model_type (`str`): `"moe_llama"`, ...
        source_types (`tuple[str, ...]`): Dense model types it is made from.
    """

    #: Whether the block's router has places for zero-computation experts at the start of upcycling.
    zero_computation = False

    def __init__(self, model_type: str, source_types: tuple[str, ...]):
        super().__init__(model_type)
        self.source_types = source_types

    def refusal(self, model, plan):
        refusal = super().refusal(model, plan)
        if refusal is not None:
            return refusal
        config = model.config
        if config.model_type == "mistral" and config.sliding_window is not None:
            return f"the source has a sliding window (`sliding_window={config.sliding_window}`), and it has none"
        return None

    def config_fields(self, source_config, plan):
        router_type, router_config = self.router_fields(plan)
        if plan.rule.factor != 1:
            router_config = {**router_config, "routed_scaling_factor": plan.rule.factor}
        config_fields = {
            "num_experts": plan.num_experts,
            "num_experts_per_tok": plan.top_k,
            "moe_layers": "all" if plan.all_layers else list(plan.layers),
            "moe_intermediate_size": plan.expert_width,
            "router_type": router_type,
            "router_config": router_config,
            "residual_expert": plan.shared == "residual",
        }
        if plan.shared_width:
            config_fields |= {"num_shared_experts": 1, "shared_expert_intermediate_size": plan.shared_width}
        return config_fields

    def router_fields(self, plan) -> tuple[str, dict]:
        """`router_type` and `router_config` for the plan's weight rule."""
        if plan.router.router_type is not None:
            return plan.router.router_type, {}
        router_type, router_config = ROUTERS[plan.rule.name]
        return router_type, dict(router_config)

    def config(self, source_config, plan):
        overrides = dict(plan.overrides)
        if "router_config" in overrides and "router_type" not in overrides:
            # Options are added to those the weight rule needs, not put in their place.
            overrides["router_config"] = {**self.config_fields(source_config, plan)["router_config"],
                                          **overrides["router_config"]}  # fmt: skip
        elif "router_type" in overrides:
            overrides.setdefault("router_config", {})
        config = self.make_config(source_config, plan, overrides)
        if config.num_zero_computation_experts and not self.zero_computation:
            raise ValueError(
                f"`target={self.name!r}` cannot start with zero-computation experts (`num_zero_experts`, ...) almost "
                'unused; use `target="moe_plus_plus"`.'
            )
        return config

    def exactness(self, config, plan):
        prediction = super().exactness(config, plan)
        known = {self.router_fields(plan)[0], *(name for name, _ in ROUTERS.values())}
        if config.router_type not in known and plan.shared != "dense":
            reason = f"nothing is known about the weights of router {config.router_type!r}"
            return prediction._replace(exact=False, reason=reason)
        return prediction

    def start_router(self, config, plan, rows, stats, generator, layer_idx):
        extra = {f"gate.{name}": tensor for name, tensor in router_state(config, plan, layer_idx).items()}
        if rows is not None and extra and "gate.weight" not in extra:
            if not isinstance(plan.router, Normal):  # the default
                raise ValueError(
                    f"`router={type(plan.router).__name__}(...)` makes a router matrix, and the router "
                    f"{config.router_type!r} has none. Leave `router` out: it then starts as it does by itself."
                )
            rows = None
        if config.residual_expert:
            std = config.initializer_range
            extra["residual_gate.weight"] = std * torch.randn(2, plan.form.hidden_size, generator=generator)
            extra["residual_gate.bias"] = torch.zeros(2)
        return self.checked(config, RouterStart(rows, None, extra))

    def checked(self, config, start: RouterStart) -> RouterStart:
        """`start` itself, if its matrix fits the router.

        Raises:
            ValueError: the router's options give its matrix another shape.
        """
        own = (start.extra or {}).get("gate.weight")
        if start.weight is not None and own is not None and own.shape != start.weight.shape:
            raise ValueError(
                f"The router {config.router_type!r} with {config.router_config} has a matrix of shape "
                f"{tuple(own.shape)}, and the router start gives {tuple(start.weight.shape)}; leave out the options "
                "that change the shape."
            )
        return start

    def may_be_missing(self, key):
        # Router buffers and the like, where they could not be written here: nothing of the dense model is in them.
        router = ".mlp.gate." in key and not key.endswith(".gate.weight")
        return router or any(part in key for part in (".residual_gate.", ".zero_experts.", "load_balancer."))

    def block_name(self, layer: UpcycledLayer) -> str:
        """Module path of the block that takes the place of a feed-forward."""
        return layer.name

    def layer_tensors(self, layer):
        block = self.block_name(layer)
        # A router's own first values, then those that replace them.
        entries = {f"{block}.{name}": tensor for name, tensor in (layer.router.extra or {}).items()}
        replaced = {f"{block}.gate.weight": layer.router.weight, f"{block}.gate.bias": layer.router.bias}
        entries |= {k: v for k, v in replaced.items() if v is not None}
        first = layer.experts[0]
        up_name = "gate_up_proj" if first.gated else "up_proj"
        entries[f"{block}.experts.{up_name}"] = torch.stack([e.gate_up for e in layer.experts])
        entries[f"{block}.experts.down_proj"] = torch.stack([e.down for e in layer.experts])
        if first.biased:
            entries[f"{block}.experts.{up_name}_bias"] = torch.stack([_up_bias(e) for e in layer.experts])
            entries[f"{block}.experts.down_proj_bias"] = torch.stack([_down_bias(e) for e in layer.experts])
        for name, ffn in (("shared_experts", layer.shared), ("residual_expert", layer.residual)):
            if ffn is not None:
                entries |= _dense(f"{block}.{name}", ffn, first.biased)
        return entries


def router_state(config: PreTrainedConfig, plan: UpcyclePlan, layer_idx: int) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a fresh router of that layer; empty where the config alone does not describe it."""
    if getattr(config, "hidden_size", None) != plan.form.hidden_size or not hasattr(config, "initializer_range"):
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed + layer_idx)
        return build_router(config, layer_idx).state_dict()


def _up_bias(ffn: DenseFeedForward) -> torch.Tensor:
    zero = ffn.up.new_zeros(ffn.intermediate_size)
    parts = [ffn.gate_bias, ffn.up_bias] if ffn.gated else [ffn.up_bias]
    return torch.cat([zero if part is None else part for part in parts])


def _down_bias(ffn: DenseFeedForward) -> torch.Tensor:
    return ffn.up.new_zeros(ffn.hidden_size) if ffn.down_bias is None else ffn.down_bias


def _dense(prefix: str, ffn: DenseFeedForward, biased: bool) -> dict[str, torch.Tensor]:
    entries = {f"{prefix}.up_proj.weight": ffn.up, f"{prefix}.down_proj.weight": ffn.down}
    if ffn.gate is not None:
        entries[f"{prefix}.gate_proj.weight"] = ffn.gate
    if biased:
        halves = _up_bias(ffn).split(ffn.intermediate_size)
        entries[f"{prefix}.up_proj.bias"], entries[f"{prefix}.down_proj.bias"] = halves[-1], _down_bias(ffn)
        if ffn.gated:
            entries[f"{prefix}.gate_proj.bias"] = halves[0]
    return entries


class MoePlusPlusTarget(BackboneTarget):
    r"""llama (and mistral without a window) -> `moe_plus_plus`, with zero-computation experts that begin almost
    unused.

    With logits G over the N feed-forward (FFN) and Z zero-computation (ZC) experts, S the K chosen ones and g their
    weights, a layer of copies E_e = s F of the dense F computes

        y = s (sum of g_i over the FFN experts in S) F(x) + (what the ZC experts in S add).

    So y = F(x) if and only if no ZC expert is in S and s * (sum over S of g_i) = 1. Two things follow.

    *No ZC expert in S.* The router input x is a normalised vector without a constant component, so no choice of
    matrix rows keeps G_zc low for every x; a bias does. Let m(x) be the K-th largest FFN logit and z(x) the largest
    ZC logit without its bias: a ZC expert enters S if and only if z(x) + b > m(x). So b = min(m - z) - 2 std(m - z)
    over the calibration tokens (random ones without `calibration`): no such token uses a ZC expert, and hardly any
    other does. The spread of m - z is small, hence b is (about -0.4 for SmolLM2-135M): the ZC experts still have
    a good part of the probability, the balance loss sees them at once, and they come into use as training goes on.
    `zero_computation_share` = u > 0 takes the u-quantile of m - z instead, so that a share u of the tokens uses ZC
    experts from the start; those are the tokens with the most unusual x, attention sinks among them, so the loss
    feels it. The gating residuals W^g start at 0, so m and z are those of each layer alone.

    *A fixed sum of weights.* The paper's Eq. 1 takes g = softmax(G) over all N + Z without renormalising: the sum over
    S varies from token to token, and with small logits is about K / N. `weights="renormalise"` (g divided by its sum
    over S, as both gating paths of the released code do) makes it 1, so s = 1 and every token that uses no ZC
    expert is computed exactly. `weights="softmax"` keeps Eq. 1 with s = 1 / (mean of the sum on calibration tokens):
    right on average, not per token; the smaller the router start's `std`, the closer.

    Constants start at N(0, initializer_range^2) instead of N(0, 1), so that a first visit does little harm. The result
    drops no tokens (`expert_capacity_factor=None`): the paper's capacity leaves the FFN experts tau N / (tau N + Z) of
    the assignments, far too little while they get nearly all; set it once the load has settled.

    Args:
        zero_computation_share (`float`, defaults to 0.0): u.
    """

    zero_computation = True
    needs = frozenset({"router_inputs"})

    def __init__(self, zero_computation_share: float = 0.0):
        super().__init__("moe_plus_plus", ("llama", "mistral"))
        if not 0 <= zero_computation_share < 1:
            raise ValueError(f"`zero_computation_share` must be in [0, 1), got {zero_computation_share}.")
        self.zero_computation_share = zero_computation_share

    def refusal(self, model, plan):
        if plan.rule.name == "sigmoid":
            return "its router is a softmax"
        if plan.router.router_type is not None:
            return "it has a router of its own"
        if plan.top_k > plan.num_experts:
            return "the start uses feed-forward experts alone"
        return super().refusal(model, plan)

    def config_fields(self, source_config, plan):
        # The paper's capacities assume that zero-computation experts take their share of the tokens. At this start
        # they do not, and training would drop about half of the assignments.
        return {**super().config_fields(source_config, plan), "expert_capacity_factor": None}

    def router_fields(self, plan):
        return "gating_residual", {"norm_topk_prob": plan.rule.name == "renormalise", "bias": True}

    def exactness(self, config, plan):
        prediction = super().exactness(config, plan)
        if not prediction.exact or not config.num_zero_computation_experts:
            return prediction
        reason = (
            f"about {self.zero_computation_share:.2g} of the tokens of a layer start with a zero-computation expert"
            if self.zero_computation_share
            else "a token unlike those the biases were set on may choose a zero-computation expert"
        )
        return prediction._replace(exact=False, reason=reason)

    def start_router(self, config, plan, rows, stats, generator, layer_idx):
        start = super().start_router(config, plan, None, stats, generator, layer_idx)
        if rows is None or start.extra is None:
            raise ValueError(f"`router={type(plan.router).__name__}(...)` gives no matrix, which MoE++ needs.")
        count, constants = config.num_zero_computation_experts, config.num_constant_experts
        bias = torch.zeros(plan.num_experts + count)
        if count:
            # The same size as the other rows, so that tokens differ in how near they are to a ZC expert.
            typical = rows.norm(dim=-1).mean() / rows.shape[-1] ** 0.5
            extra_rows = typical * torch.randn(count, rows.shape[-1], generator=generator)
            inputs = required(stats, "router_inputs", self).float()
            last_chosen = F.linear(inputs, rows).topk(plan.top_k, dim=-1).values[:, -1]  # m, (T,)
            best_extra = F.linear(inputs, extra_rows).amax(dim=-1)  # z, (T,)
            room = last_chosen - best_extra
            margin = 2 * room.std() if self.zero_computation_share == 0 else 0.0
            bias[plan.num_experts :] = torch.quantile(room, self.zero_computation_share) - margin
            rows = torch.cat([rows, extra_rows])
        if constants:
            std, hidden_size = config.initializer_range, rows.shape[-1]
            start.extra["zero_experts.constants"] = std * torch.randn(constants, hidden_size, generator=generator)
            gate = std * torch.randn(constants, 2, hidden_size, generator=generator)
            start.extra["zero_experts.constant_gate"] = gate
        return self.checked(config, start._replace(weight=rows, bias=bias))


class EncoderTarget(BackboneTarget):
    """`moe_bert` and `moe_roberta`, whose blocks take the place of two modules of a dense layer."""

    def refusal(self, model, plan):
        refusal = super().refusal(model, plan)
        if refusal is None and (model.config.is_decoder or model.config.add_cross_attention):
            return "the source is a decoder (`is_decoder`, `add_cross_attention`)"
        return refusal

    def block_name(self, layer):
        return f"{layer.layer_name}.mlp"


def backbone_targets() -> list[BackboneTarget]:
    """All of them; `moe_plus_plus` is never chosen by `"auto"`."""
    from .llava import LlavaTarget
    from .t5 import T5Target

    return [
        BackboneTarget("moe_llama", ("llama", "mistral")),
        BackboneTarget("moe_qwen2", ("qwen2",)),
        BackboneTarget("moe_qwen3", ("qwen3",)),
        BackboneTarget("moe_gpt2", ("gpt2",)),
        T5Target(),
        EncoderTarget("moe_bert", ("bert",)),
        EncoderTarget("moe_roberta", ("roberta", "xlm-roberta", "camembert")),
        BackboneTarget("moe_stablelm", ("stablelm",)),
        BackboneTarget("moe_phi", ("phi",)),
        LlavaTarget(),
        MoePlusPlusTarget(),
    ]
