"""`moe_stablelm`: StableLM and StableLM 2 with Mixture-of-Experts feed-forwards."""

from huggingface_hub.dataclasses import strict
from transformers.models.stablelm.configuration_stablelm import StableLmConfig

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["MoeStableLmConfig"]


@strict
class MoeStableLmConfig(MoeConfigMixin, StableLmConfig):
    r"""Configuration of [`MoeStableLmModel`]: every field of `StableLmConfig` and of [`MoeConfigMixin`].

    Example:

    ```python
    >>> from hf_moe import MoeStableLmConfig, MoeStableLmForCausalLM
    >>> config = MoeStableLmConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MoeStableLmForCausalLM(config)
    ```
    """

    model_type = "moe_stablelm"
    attribute_map = {"num_local_experts": "num_experts"}


__getattr__ = declare_backbone(
    __name__,
    MoeStableLmConfig,
    "transformers.models.stablelm.modeling_stablelm",
    "StableLm",
    layer_mixin=".layer:MoeStableLmLayerMixin",
)
