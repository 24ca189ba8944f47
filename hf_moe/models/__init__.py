"""Model types. Importing this package announces them; configs and model classes follow when they are first needed."""

from hf_moe.registration import announce_config


# One line per model type: the folder, whose `__init__` registers the type, and the name of its config class.
MODEL_TYPES = {
    "moe_gpt2": "gpt2:MoeGPT2Config",
    "moe_llama": "llama:MoeLlamaConfig",
    "moe_plus_plus": "moe_plus_plus:MoePlusPlusConfig",
    "moe_qwen2": "qwen2:MoeQwen2Config",
    "moe_qwen3": "qwen3:MoeQwen3Config",
}

for _model_type, _target in MODEL_TYPES.items():
    announce_config(_model_type, f"{__name__}.{_target}")

__all__ = ["MODEL_TYPES"]
