"""`read_me`: a dense Llama refactored into subsets of neurons, chosen by one router for all layers (2410.19123)."""

from hf_moe.lazy import lazy_exports
from hf_moe.registration import register_config

from .configuration_read_me import ReadMeConfig


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ReadMeConfig": ".configuration_read_me",
        "ReadMeForCausalLM": ".modeling_read_me",
        "ReadMeModel": ".modeling_read_me",
        "ReadMePreTrainedModel": ".modeling_read_me",
        "ReadMeRouter": ".router",
    },
)


def _model_classes() -> dict[str, type]:
    from .modeling_read_me import ReadMeForCausalLM, ReadMeModel

    return {"AutoModel": ReadMeModel, "AutoModelForCausalLM": ReadMeForCausalLM}


register_config(ReadMeConfig, _model_classes)
