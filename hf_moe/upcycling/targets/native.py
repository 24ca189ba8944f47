"""Native targets: MoE families of transformers, so that the result loads without this package.

Entries are named as each family *saves* them; its own converters fuse the experts when the checkpoint is loaded.

Shapes: D hidden, I expert width, N experts.
"""

from typing import Any

import torch

from hf_moe.upcycling.feed_forward import DenseFeedForward
from hf_moe.upcycling.plan import UpcycledLayer, UpcyclePlan

from .base import CheckpointTarget


__all__ = ["FlexOlmoTarget", "GraniteMoeTarget", "MixtralTarget", "NativeTarget", "QwenMoeTarget", "native_targets"]


class NativeTarget(CheckpointTarget):
    """Base of the native targets: the checks they share. A family is a subclass with its names.

    Attributes:
        rules (`tuple[str, ...]`): Weight rules the family can follow.
        any_layers (`bool`): Whether some layers may stay dense.
        shared_kinds (`tuple[str, ...]`): Of `"dense"` and `"fraction"`: what it can do as shared expert.
    """

    rules: tuple[str, ...] = ("renormalise",)
    any_layers = False
    shared_kinds: tuple[str, ...] = ()

    def refusal(self, model, plan):
        refusal = super().refusal(model, plan)
        if refusal is not None:
            return refusal
        if plan.form.biased or not plan.form.gated:
            return "its experts are gated and have no biases"
        if plan.rule.name not in self.rules or plan.rule.factor != 1:
            return f"its weights are {' or '.join(self.rules)}, not {plan.rule.name}"
        if plan.router.router_type is not None:
            return "it has a router of its own"
        if not self.any_layers and not plan.all_layers:
            return "all its layers are MoE layers"
        if plan.shared is not None:
            kind = plan.shared if isinstance(plan.shared, str) else "fraction"
            if kind not in self.shared_kinds:
                return f"it has no place for `shared={plan.shared!r}`"
        return self.more_refusal(model.config, plan)

    def more_refusal(self, config, plan: UpcyclePlan) -> str | None:
        """What else keeps this family from holding the result."""
        return None


class MixtralTarget(NativeTarget):
    """llama and mistral -> mixtral."""

    source_types = ("llama", "mistral")

    def __init__(self):
        super().__init__("mixtral")

    def more_refusal(self, config, plan):
        if getattr(config, "attention_bias", False):
            return "its attention has no biases"
        return None

    def config_fields(self, source_config, plan):
        return {
            "num_local_experts": plan.num_experts,
            "num_experts_per_tok": plan.top_k,
            "intermediate_size": plan.expert_width,
            # Llama has none; Mixtral must not invent one.
            "sliding_window": getattr(source_config, "sliding_window", None),
            "router_aux_loss_coef": 0.01,
        }

    def layer_tensors(self, layer):
        block = f"{layer.layer_name}.block_sparse_moe"
        entries = {f"{block}.gate.weight": layer.router.weight}
        for e, expert in enumerate(layer.experts):
            entries[f"{block}.experts.{e}.w1.weight"] = expert.gate
            entries[f"{block}.experts.{e}.w3.weight"] = expert.up
            entries[f"{block}.experts.{e}.w2.weight"] = expert.down
        return entries


class QwenMoeTarget(NativeTarget):
    """qwen2 -> qwen2_moe (which always has a shared expert) and qwen3 -> qwen3_moe (which has none).

    Qwen2-MoE weighs its shared expert by sigmoid(w . x): with w = 0 that is 1/2, so the shared W_d is doubled.
    Without a shared part the shared expert is a narrow one that starts at zero.
    """

    rules = ("renormalise", "softmax")
    any_layers = True
    #: Narrowest shared expert that every experts kernel and every tensor-parallel size up to 8 can handle.
    IDLE_SHARED_WIDTH = 8

    def __init__(self, model_type: str):
        super().__init__(model_type)
        self.has_shared = model_type == "qwen2_moe"
        self.source_types = ("qwen2",) if self.has_shared else ("qwen3",)
        self.shared_kinds = ("dense", "fraction") if self.has_shared else ()

    def more_refusal(self, config, plan):
        kinds = set(getattr(config, "layer_types", None) or ())
        if not self.has_shared and len(kinds) > 1:
            return "all its layers have the same attention, and those of the source have not"
        return None

    def config_fields(self, source_config, plan):
        config_fields = {
            "num_experts": plan.num_experts,
            "num_experts_per_tok": plan.top_k,
            "moe_intermediate_size": plan.expert_width,
            "norm_topk_prob": plan.rule.name == "renormalise",
            "decoder_sparse_step": 1,
            "mlp_only_layers": plan.dense_layers,
            "router_aux_loss_coef": 0.01,
        }
        if self.has_shared:
            config_fields["shared_expert_intermediate_size"] = plan.shared_width or self.IDLE_SHARED_WIDTH
            config_fields["qkv_bias"] = True
        return config_fields

    def layer_tensors(self, layer):
        block = layer.name
        entries = {f"{block}.gate.weight": layer.router.weight}
        for e, expert in enumerate(layer.experts):
            entries |= _gated(f"{block}.experts.{e}", expert)
        if self.has_shared:
            shared = layer.shared
            if shared is None:
                # W_d = 0: silent, yet its gradient is not zero, so it may learn.
                shared = layer.experts[0].channels(range(self.IDLE_SHARED_WIDTH)).silenced()
            entries |= _gated(f"{block}.shared_expert", shared.scaled(2))
            entries[f"{block}.shared_expert_gate.weight"] = shared.up.new_zeros(1, shared.hidden_size)
        return entries


class GraniteMoeTarget(NativeTarget):
    """granite -> granitemoe, or granitemoeshared where there is a shared part. Experts are saved fused."""

    source_types = ("granite",)

    def __init__(self, model_type: str):
        super().__init__(model_type)
        self.has_shared = model_type == "granitemoeshared"
        self.shared_kinds = ("dense", "fraction") if self.has_shared else ()

    def more_refusal(self, config, plan):
        if self.has_shared and plan.shared is None:
            return "it is for recipes with a shared part"
        return None

    def config_fields(self, source_config, plan):
        config_fields = {
            "num_local_experts": plan.num_experts,
            "num_experts_per_tok": plan.top_k,
            "intermediate_size": plan.expert_width,
            "router_aux_loss_coef": 0.01,
        }
        if self.has_shared:
            config_fields["shared_intermediate_size"] = plan.shared_width
        return config_fields

    def layer_tensors(self, layer):
        block = f"{layer.layer_name}.block_sparse_moe"
        entries = {
            f"{block}.router.layer.weight": layer.router.weight,
            f"{block}.input_linear.weight": torch.stack([e.gate_up for e in layer.experts]),  # (N, 2I, D)
            f"{block}.output_linear.weight": torch.stack([e.down for e in layer.experts]),  # (N, D, I)
        }
        if layer.shared is not None:
            shared = f"{layer.layer_name}.shared_mlp"
            entries[f"{shared}.input_linear.weight"] = layer.shared.gate_up
            entries[f"{shared}.output_linear.weight"] = layer.shared.down
        return entries


class FlexOlmoTarget(NativeTarget):
    """olmo2 -> flex_olmo."""

    source_types = ("olmo2",)
    rules = ("renormalise", "softmax")

    def __init__(self):
        super().__init__("flex_olmo")

    def config_fields(self, source_config, plan):
        return {
            "num_experts": plan.num_experts,
            "num_experts_per_tok": plan.top_k,
            "intermediate_size": plan.expert_width,
            "norm_topk_prob": plan.rule.name == "renormalise",
            "router_aux_loss_coef": 0.01,
        }

    def layer_tensors(self, layer: UpcycledLayer):
        entries = {f"{layer.name}.gate.weight": layer.router.weight}
        for e, expert in enumerate(layer.experts):
            entries |= _gated(f"{layer.name}.experts.{e}", expert)
        return entries


def _gated(prefix: str, ffn: DenseFeedForward) -> dict[str, Any]:
    return {
        f"{prefix}.gate_proj.weight": ffn.gate,
        f"{prefix}.up_proj.weight": ffn.up,
        f"{prefix}.down_proj.weight": ffn.down,
    }


def native_targets() -> list[NativeTarget]:
    """All of them."""
    return [
        MixtralTarget(),
        QwenMoeTarget("qwen2_moe"),
        QwenMoeTarget("qwen3_moe"),
        GraniteMoeTarget("granitemoe"),
        GraniteMoeTarget("granitemoeshared"),
        FlexOlmoTarget(),
    ]
