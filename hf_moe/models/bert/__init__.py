"""`moe_bert`: BERT and models of its layout (MiniLM, BGE, E5)."""

from huggingface_hub.dataclasses import strict
from transformers.models.bert.configuration_bert import BertConfig

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.encoder_backbone import EncoderBackbone
from hf_moe.models.encoder_configuration import MoeEncoderConfigMixin


__all__ = ["MoeBertConfig"]


@strict
class MoeBertConfig(MoeEncoderConfigMixin, BertConfig):
    r"""Configuration of [`MoeBertModel`]: every field of `BertConfig` and of [`MoeConfigMixin`].

    Raises:
        ValueError: `is_decoder` or `add_cross_attention`: there is no decoder of this type.

    Example:

    ```python
    >>> from hf_moe import MoeBertConfig, MoeBertForMaskedLM
    >>> config = MoeBertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = MoeBertForMaskedLM(config)
    ```
    """

    model_type = "moe_bert"
    attribute_map = {"num_local_experts": "num_experts"}


__getattr__ = declare_backbone(
    __name__,
    MoeBertConfig,
    "transformers.models.bert.modeling_bert",
    "Bert",
    kind=EncoderBackbone,
    masked_lm_head="cls",
)
