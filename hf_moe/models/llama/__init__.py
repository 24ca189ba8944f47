"""`moe_llama`: Llama, SmolLM, and Mistral without a sliding window."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["MoeLlamaConfig"]


@strict
class MoeLlamaConfig(MoeConfigMixin, LlamaConfig):
    r"""Configuration of [`MoeLlamaModel`]: every field of `LlamaConfig` and of [`MoeConfigMixin`].

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig, MoeLlamaForCausalLM
    >>> config = MoeLlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MoeLlamaForCausalLM(config)
    ```
    """

    model_type = "moe_llama"
    attribute_map = {"num_local_experts": "num_experts"}


__getattr__ = declare_backbone(__name__, MoeLlamaConfig, "transformers.models.llama.modeling_llama", "Llama")
