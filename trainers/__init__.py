"""Trainers, their configurations and callbacks; imported as `hf_moe.trainers`, each name on first use."""

from hf_moe.lazy import lazy_exports


# public name -> the module of this folder that defines it
_EXPORTS: dict[str, str] = {
    "MoeDPOConfig": ".dpo_config",
    "MoeDPOTrainer": ".dpo_trainer",
    "MoeSFTConfig": ".sft_config",
    "MoeSFTTrainer": ".sft_trainer",
    "MoeTrainer": ".moe_trainer",
    "MoeTrainerMixin": ".moe_mixin",
    "MoeTrainingArguments": ".moe_config",
    "RouterLossCollector": ".router_losses",
    "optimizer_groups": ".parameter_groups",
    "parameter_roles": ".parameter_groups",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
