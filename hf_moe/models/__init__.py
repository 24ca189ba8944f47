"""Model types. Importing this package announces them; configs and model classes follow when they are first needed."""

from functools import partial
from importlib import import_module

from hf_moe.registration import announce_config, announce_processor


# One line per model type: the folder, whose `__init__` registers the type, and the name of its config class.
MODEL_TYPES = {
    "dynamic_moe": ("dynamic_moe", "DynamicMoeConfig"),
    "moe_bert": ("bert", "MoeBertConfig"),
    "moe_clip": ("clip", "MoeClipConfig"),
    "moe_clip_text_model": ("clip", "MoeClipTextConfig"),
    "moe_clip_vision_model": ("clip", "MoeClipVisionConfig"),
    "moe_gpt2": ("gpt2", "MoeGPT2Config"),
    "moe_llama": ("llama", "MoeLlamaConfig"),
    "moe_llava": ("moe_llava", "MoeLlavaConfig"),
    "moe_phi": ("phi", "MoePhiConfig"),
    "moe_plus_plus": ("moe_plus_plus", "MoePlusPlusConfig"),
    "moe_qwen2": ("qwen2", "MoeQwen2Config"),
    "moe_qwen3": ("qwen3", "MoeQwen3Config"),
    "moe_roberta": ("roberta", "MoeRobertaConfig"),
    "moe_stablelm": ("stablelm", "MoeStableLmConfig"),
    "moe_t5": ("t5", "MoeT5Config"),
    "pr_moe": ("pr_moe", "PrMoeConfig"),
    "read_me": ("read_me", "ReadMeConfig"),
    "softmax_gaussian_moe": ("softmax_gaussian_moe", "SoftmaxGaussianMoEConfig"),
    "uni_moe": ("uni_moe", "UniMoeConfig"),
}
#: Model types with a processor class of their own.
PROCESSORS = {"uni_moe": "UniMoeProcessor"}
#: `upcycled_<type>` exists for every dense type of transformers.
UPCYCLED_PREFIX = "upcycled_"

__all__ = ["MODEL_TYPES", "UPCYCLED_PREFIX", "config_class"]


def config_class(model_type: str) -> type:
    """The config class of one of `MODEL_TYPES`."""
    folder, name = MODEL_TYPES[model_type]
    return getattr(import_module(f"{__name__}.{folder}"), name)


def _upcycled(dense_type: str) -> type:
    return import_module(f"{__name__}.upcycled").upcycled_config_class(dense_type)


def _processor(model_type: str) -> type:
    return getattr(import_module(f"{__name__}.{MODEL_TYPES[model_type][0]}"), PROCESSORS[model_type])


def _announce() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for model_type, (_, name) in MODEL_TYPES.items():
        announce_config(model_type, name, partial(config_class, model_type))
    for dense_type, name in CONFIG_MAPPING_NAMES.items():
        announce_config(UPCYCLED_PREFIX + dense_type, f"Upcycled{name}", partial(_upcycled, dense_type))
    for model_type, name in PROCESSORS.items():
        announce_processor(name, partial(_processor, model_type))


_announce()
