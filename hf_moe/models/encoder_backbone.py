"""Declares an encoder of BERT's family, as `backbone.py` declares decoders."""

import importlib
from dataclasses import dataclass
from typing import ClassVar

from .backbone import Backbone


__all__ = ["EncoderBackbone"]

HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


@dataclass(frozen=True)
class EncoderBackbone(Backbone):
    """A family of encoder classes yet to be made. Its dense layers are `<prefix>Layer` with `intermediate` and
    `output`, as in BERT.

    Args:
        masked_lm_head (`str`, defaults to `"lm_head"`): Attribute of the dense masked language model that maps hidden
            states to the vocabulary.

    Example:

    ```python
    __getattr__ = declare_backbone(
        __name__, MoeBertConfig, "transformers.models.bert.modeling_bert", "Bert", kind=EncoderBackbone,
        masked_lm_head="cls",
    )
    ```
    """

    masked_lm_head: str = "lm_head"
    layers_attribute: str = "encoder.layer"

    heads: ClassVar[tuple[str, ...]] = HEADS
    parts: ClassVar[tuple[str, ...]] = ("PreTrainedModel", "Layer")

    def make_classes(self) -> None:
        from . import encoder, encoder_heads
        from .modeling import MoePreTrainedMixin

        dense = importlib.import_module(self.dense_module)
        dense_base = getattr(dense, f"{self.prefix}PreTrainedModel")
        dense_layer = getattr(dense, self.layer or f"{self.prefix}Layer")
        layer = self.make("Layer", (encoder.MoeEncoderLayerMixin, dense_layer), "A layer that may hold a `MoeBlock`.")
        records = {name: of for name, of in dense_base._can_record_outputs.items() if name != "cross_attentions"}
        base = self.make(
            "PreTrainedModel",
            (MoePreTrainedMixin, dense_base),
            f"Base of the `{self.config_class.model_type}` classes.",
            config_class=self.config_class,
            _no_split_modules=[f"{self.prefix}Embeddings", layer.__name__],
            _can_record_outputs={**records, **MoePreTrainedMixin.ROUTER_RECORDS, "hidden_states": layer},
        )
        model = self.make(
            "Model",
            (encoder.MoeEncoderModelMixin, base, getattr(dense, f"{self.prefix}Model")),
            "The encoder without a head.",
            moe_layer_class=layer,
            layers_attribute=self.layers_attribute,
        )
        docs = {
            "ForMaskedLM": "Masked language model.",
            "ForSequenceClassification": "Sequence classification.",
            "ForTokenClassification": "Token classification.",
            "ForQuestionAnswering": "Extractive question answering.",
        }
        for head, doc in docs.items():
            attributes = {"lm_head_attribute": self.masked_lm_head} if head == "ForMaskedLM" else {}
            self.make(
                head,
                (getattr(encoder_heads, f"MoeEncoder{head}Mixin"), base, getattr(dense, self.prefix + head)),
                f"{doc} See [`MoeEncoder{head}Mixin`] for what `forward` takes and returns.",
                base_class=model,
                **attributes,
            )
