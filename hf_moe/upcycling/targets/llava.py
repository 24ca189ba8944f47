"""LLaVA -> `moe_llava`: the language model becomes one of this package's, everything else stays."""

from dataclasses import fields, replace
from typing import Any

from .backbone import BackboneTarget
from .base import NOT_CARRIED


__all__ = ["LlavaTarget"]


class LlavaTarget(BackboneTarget):
    """LLaVA with a language model that has a backbone here, to `moe_llava`."""

    def __init__(self):
        super().__init__("moe_llava", ("llava",))

    def text_target(self, source_config) -> BackboneTarget | None:
        """The target of the language model alone, `None` where it has no backbone here."""
        from hf_moe.models.moe_llava.configuration_moe_llava import BACKBONES

        dense_type = source_config.text_config.model_type
        return BackboneTarget(BACKBONES[dense_type], (dense_type,)) if dense_type in BACKBONES else None

    def refusal(self, model, plan):
        refusal = super().refusal(model, plan)
        if refusal is not None:
            return refusal
        text = model.config.text_config
        if self.text_target(model.config) is None:
            return f"its language model, {text.model_type}, has no backbone here"
        if getattr(text, "sliding_window", None) is not None and text.model_type == "mistral":
            return f"the language model has a sliding window (`sliding_window={text.sliding_window}`), and it has none"
        outside = [module for module in plan.modules if not module.startswith("language_model.")]
        return f"`{outside[0]}` is not in the language model" if outside else None

    def config(self, source_config, plan):
        config_class: Any = self.config_class(source_config)
        known = {f.name for f in fields(config_class)} - {"text_config", "vision_config"}
        own = {name: value for name, value in plan.overrides.items() if name in known}
        rest = {name: value for name, value in plan.overrides.items() if name not in own}
        text_target: Any = self.text_target(source_config)
        text_config = text_target.config(source_config.text_config, replace(plan, overrides=rest))
        carried = {name: value for name, value in source_config.to_dict().items() if name not in NOT_CARRIED}
        return config_class(**{**carried, "text_config": text_config, **own})

    def start_router(self, config, plan, rows, stats, generator, layer_idx):
        return super().start_router(config.text_config, plan, rows, stats, generator, layer_idx)
