"""`moe_gpt2`: GPT-2 with Mixture-of-Experts feed-forwards."""

from huggingface_hub.dataclasses import strict
from transformers.models.gpt2.configuration_gpt2 import GPT2Config

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["MoeGPT2Config"]


@strict
class MoeGPT2Config(MoeConfigMixin, GPT2Config):
    r"""Configuration of [`MoeGPT2Model`]: every field of `GPT2Config` and of [`MoeConfigMixin`].

    Raises:
        ValueError: `add_cross_attention=True`; the MoE layers are decoder-only.

    Example:

    ```python
    >>> from hf_moe import MoeGPT2Config, MoeGPT2ForCausalLM
    >>> model = MoeGPT2ForCausalLM(MoeGPT2Config(n_embd=64, n_layer=2, n_head=4))
    ```
    """

    model_type = "moe_gpt2"
    attribute_map = {**GPT2Config.attribute_map, "num_local_experts": "num_experts"}
    moe_block_path = "h.*.mlp"

    @property
    def default_expert_type(self) -> str:
        """Two matrices with biases."""
        return "mlp_bias"

    @property
    def expert_activation(self) -> str:
        """GPT-2 calls it `activation_function`."""
        return self.activation_function

    @property
    def intermediate_width(self) -> int:
        """GPT-2 calls it `n_inner`, four times the hidden size by default."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    def validate_architecture(self):
        """[`MoeConfigMixin`]'s rules, and no cross-attention."""
        if self.add_cross_attention:
            raise ValueError(f"`add_cross_attention` must be False: `{self.model_type}` is decoder-only.")
        super().validate_architecture()


__getattr__ = declare_backbone(
    __name__,
    MoeGPT2Config,
    "transformers.models.gpt2.modeling_gpt2",
    "GPT2",
    layer="GPT2Block",
    causal_lm="GPT2LMHeadModel",
    layers_attribute="h",
    layer_mixin=".block:MoeGPT2BlockMixin",
)
