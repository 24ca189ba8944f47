"""`uni_moe`: Uni-MoE (2405.11273), a MoE language model that reads text, images, videos, speech and sounds."""

from hf_moe.lazy import lazy_exports
from hf_moe.registration import register_config

from .configuration_uni_moe import UniMoeConfig


def _modeling() -> dict[str, type]:
    from .modeling_uni_moe import UniMoeForConditionalGeneration, UniMoeModel
    from .processing_uni_moe import UniMoeProcessor

    return {
        "AutoModel": UniMoeModel,
        "AutoModelForImageTextToText": UniMoeForConditionalGeneration,
        "AutoModelForMultimodalLM": UniMoeForConditionalGeneration,
        "AutoModelForCausalLM": UniMoeForConditionalGeneration,
        "AutoProcessor": UniMoeProcessor,
    }


register_config(UniMoeConfig, _modeling)

__getattr__, __dir__, _NAMES = lazy_exports(
    __name__,
    {
        "UniMoeForConditionalGeneration": ".modeling_uni_moe",
        "UniMoeModel": ".trunk_uni_moe",
        "UniMoePreTrainedModel": ".trunk_uni_moe",
        "UniMoeProcessor": ".processing_uni_moe",
    },
)
__all__ = ["UniMoeConfig", *_NAMES]
