"""`moe_roberta`: RoBERTa and models of its layout."""

from huggingface_hub.dataclasses import strict
from transformers.models.roberta.configuration_roberta import RobertaConfig

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.encoder_backbone import EncoderBackbone
from hf_moe.models.encoder_configuration import MoeEncoderConfigMixin


__all__ = ["MoeRobertaConfig"]


@strict
class MoeRobertaConfig(MoeEncoderConfigMixin, RobertaConfig):
    r"""Configuration of [`MoeRobertaModel`]: every field of `RobertaConfig` and of [`MoeConfigMixin`].

    Raises:
        ValueError: `is_decoder` or `add_cross_attention`: there is no decoder of this type.

    Example:

    ```python
    >>> from hf_moe import MoeRobertaConfig, MoeRobertaForMaskedLM
    >>> config = MoeRobertaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MoeRobertaForMaskedLM(config)
    ```
    """

    model_type = "moe_roberta"
    attribute_map = {"num_local_experts": "num_experts"}


__getattr__ = declare_backbone(
    __name__,
    MoeRobertaConfig,
    "transformers.models.roberta.modeling_roberta",
    "Roberta",
    kind=EncoderBackbone,
    masked_lm_head="lm_head",
)
