"""`moe_llava`: MoE-LLaVA (2401.15947), a LLaVA whose language model is any decoder backbone of this package."""

from hf_moe.lazy import lazy_exports
from hf_moe.registration import register_config

from .configuration_moe_llava import MoeLlavaConfig


def _modeling() -> dict[str, type]:
    from transformers.models.llava.processing_llava import LlavaProcessor

    from .modeling_moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaModel

    # Nothing to register early: checkpoints name their processor, and its class is transformers' own.
    return {
        "AutoModel": MoeLlavaModel,
        "AutoModelForImageTextToText": MoeLlavaForConditionalGeneration,
        "AutoModelForCausalLM": MoeLlavaForConditionalGeneration,
        "AutoProcessor": LlavaProcessor,
    }


register_config(MoeLlavaConfig, _modeling)

__getattr__, __dir__, _NAMES = lazy_exports(
    __name__,
    {
        "MoeLlavaForConditionalGeneration": ".modeling_moe_llava",
        "MoeLlavaModel": ".modeling_moe_llava",
        "MoeLlavaPreTrainedModel": ".modeling_moe_llava",
    },
)
__all__ = ["MoeLlavaConfig", *_NAMES]
