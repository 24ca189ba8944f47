"""`moe_phi`: Phi-1, Phi-1.5 and Phi-2 with Mixture-of-Experts feed-forwards."""

from huggingface_hub.dataclasses import strict
from transformers.models.phi.configuration_phi import PhiConfig

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["MoePhiConfig"]


@strict
class MoePhiConfig(MoeConfigMixin, PhiConfig):
    r"""Configuration of [`MoePhiModel`]: every field of `PhiConfig` and of [`MoeConfigMixin`].

    Example:

    ```python
    >>> from hf_moe import MoePhiConfig, MoePhiForCausalLM
    >>> config = MoePhiConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MoePhiForCausalLM(config)
    ```
    """

    model_type = "moe_phi"
    attribute_map = {"num_local_experts": "num_experts"}

    @property
    def default_expert_type(self) -> str:
        """Two matrices with biases."""
        return "mlp_bias"


__getattr__ = declare_backbone(
    __name__,
    MoePhiConfig,
    "transformers.models.phi.modeling_phi",
    "Phi",
    layer_mixin=".layer:MoePhiLayerMixin",
    lm_head_bias=True,
)
