"""Mixture-of-Experts methods behind the extension points of transformers, PEFT and TRL.

`import hf_moe` makes every model type, router and trainer known; what is heavy is imported when first used.
"""

__version__ = "0.1.0"

from .lazy import lazy_exports
from .versions import check_versions


# Before anything of transformers is touched: an unsupported version should fail with a sentence, not somewhere inside.
check_versions()

from . import models as models  # noqa: E402  (announces every model type)
from .registration import register_adapters, register_experts_implementations, register_quantizers  # noqa: E402


register_adapters()
register_experts_implementations()
register_quantizers()


_BACKBONES = {
    "GPT2": "gpt2", "Llama": "llama", "Phi": "phi", "Qwen2": "qwen2", "Qwen3": "qwen3", "StableLm": "stablelm"
}  # fmt: skip
_HEADS = ("Config", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model", "PreTrainedModel")
_VLM_HEADS = ("Config", "ForConditionalGeneration", "Model", "PreTrainedModel")
_CLIP_NAMES = (
    *("Config", "ForImageClassification", "Model", "PreTrainedModel"),
    *(f"{tower}{name}" for tower in ("Text", "Vision") for name in ("Config", "Model", "ModelWithProjection")),
)
_ENCODERS = {"Bert": "bert", "Roberta": "roberta"}
_T5_HEADS = ("Config", "EncoderModel", "ForConditionalGeneration", "Model", "PreTrainedModel")
_ENCODER_HEADS = ("ForMaskedLM", "ForQuestionAnswering", *(head for head in _HEADS if head != "ForCausalLM"))

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **{f"Moe{name}{head}": f".models.{folder}" for name, folder in _BACKBONES.items() for head in _HEADS},
        **{f"Moe{name}{head}": f".models.{folder}" for name, folder in _ENCODERS.items() for head in _ENCODER_HEADS},
        **{f"DynamicMoe{head}": ".models.dynamic_moe" for head in _HEADS},
        **{f"MoeClip{name}": ".models.clip" for name in _CLIP_NAMES},
        **{f"MoeLlava{head}": ".models.moe_llava" for head in _VLM_HEADS},
        **{f"MoePlusPlus{head}": ".models.moe_plus_plus" for head in _HEADS},
        **{f"PrMoe{head}": ".models.pr_moe" for head in _HEADS},
        **{f"ReadMe{head}": ".models.read_me" for head in ("Config", "ForCausalLM", "Model", "PreTrainedModel")},
        **{f"MoeT5{head}": ".models.t5" for head in _T5_HEADS},
        **{f"UniMoe{head}": ".models.uni_moe" for head in (*_VLM_HEADS, "Processor")},
        "AgdConfig": ".adapters",
        "BaseRouter": ".routing",
        "ExpertScores": ".attribution",
        "ExpertSliceConfig": ".adapters",
        "GlobalBalanceCallback": ".routing",
        "GrowthReport": ".upcycling",
        "LoadBalancer": ".routing",
        "LocalExpertConfig": ".adapters",
        "MoeBlock": ".layers",
        "MixdaConfig": ".adapters",
        "MosaConfig": ".adapters",
        "PillConfig": ".adapters",
        "RouterOutput": ".routing",
        "RouterScheduleCallback": ".routing",
        "RouterStats": ".routing",
        "RoutingContext": ".routing",
        "active_compute": ".active_compute",
        "assemble_llava": ".models.moe_llava.assemble",
        "attribute_experts": ".attribution",
        "combine_uni_moe": ".upcycling",
        "convert_to_readme": ".upcycling",
        "create_model_card": ".model_cards",
        "drop_layers": ".models.drop_layers",
        "expand_experts": ".upcycling",
        "grow_model": ".upcycling",
        "export_ternary": ".quantization",
        "list_experts": ".experts",
        "list_models": ".discovery",
        "list_routers": ".routing",
        "metrics": ".metrics",
        "load_dense": ".weights",
        "moe_layers": ".views",
        "push_to_hub": ".hub",
        "record_routing": ".views",
        "register_experts": ".experts",
        "register_router": ".routing",
        "reporting": ".reporting",
        "routing_override": ".routing_override",
        "routing_report": ".reporting",
        "statistics": ".statistics",
        "supported_families": ".view_listing",
        "trainers": ".trainers",
        "upcycle": ".upcycling",
        "upcycle_clip": ".upcycling",
        "upcycle_checkpoint": ".upcycling",
        "upcycle_llava": ".upcycling",
        "upcycle_uni_moe": ".upcycling",
        "upcycle_mote": ".upcycling",
        "UpcycleReport": ".upcycling",
        "SelfContrast": ".generation",
        "SoftmaxGaussianMoE": ".statistics",
        "SoftmaxGaussianMoEConfig": ".models.softmax_gaussian_moe",
        "SoftmaxGaussianMoEForRegression": ".models.softmax_gaussian_moe",
        "generation": ".generation",
        "scmoe_generate": ".generation",
    },
)
