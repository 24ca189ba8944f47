"""Heads of encoders: the dense ones of transformers, with router losses and outputs.

Shapes: B batch, S sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import MaskedLMOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .encoder import MoeEncoderOutput
from .modeling import MoeTokenClassifierOutput, RouterLossesMixin


__all__ = [
    "MoeEncoderForMaskedLMMixin",
    "MoeEncoderForQuestionAnsweringMixin",
    "MoeEncoderForSequenceClassificationMixin",
    "MoeEncoderForTokenClassificationMixin",
    "MoeEncoderSequenceClassifierOutput",
    "MoeMaskedLMOutput",
    "MoeQuestionAnsweringOutput",
]


@dataclass
class MoeMaskedLMOutput(MaskedLMOutput):
    """Masked-language-model output; `aux_loss` is the unweighted load-balance loss, a mean over MoE layers."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeEncoderSequenceClassifierOutput(SequenceClassifierOutput):
    """Sequence-classification output with the router fields of [`MoeMaskedLMOutput`]."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """Question-answering output with the router fields of [`MoeMaskedLMOutput`]."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


class _EncoderHeadMixin(RouterLossesMixin):
    """Goes in front of a dense head class: the MoE base model takes the dense one's place, and losses gain router
    losses. A head defines `forward`."""

    #: The MoE base model class of the backbone.
    base_class: type
    # Means over the micro-batch, so Trainer has to divide them by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: Any):
        # The dense base model that is made on the way refuses any experts implementation but "eager".
        requested = config._experts_implementation
        config._experts_implementation = "eager"
        super().__init__(config)
        self.config._experts_implementation = self.get_correct_experts_implementation(requested)

    def post_init(self) -> None:
        # The dense `__init__` ends with `post_init`: the last moment before weights are initialised.
        dense = self.base_model
        if dense.is_activation_checkpointing:  # it has taken this old field out of the config
            self.config.gradient_checkpointing = True
        moe = self.base_class(self.config, add_pooling_layer=dense.pooler is not None)
        setattr(self, self.base_model_prefix, moe)
        super().post_init()

    def encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        output_router_logits: bool | None,
        **kwargs,
    ) -> tuple[MoeEncoderOutput, dict[str, Any]]:
        """The base model's output, and what every head's output takes from it; the router losses have begun.

        Returns:
            [`MoeEncoderOutput`] and the fields `hidden_states`, `attentions`, `router_logits`, `router_indices`.
        """
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_router_logits=self.wants_routing(output_router_logits),
            **kwargs,
        )
        fields = {
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "router_logits": outputs.all_router_logits,
            "router_indices": outputs.router_indices,
        }
        return outputs, fields


class MoeEncoderForMaskedLMMixin(_EncoderHeadMixin):
    """Masked language model. The cross-entropy is divided by `num_items_in_batch` where Trainer passes it."""

    accepts_loss_kwargs = True
    #: Attribute of the dense head: hidden states to vocabulary.
    lm_head_attribute: str

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MoeMaskedLMOutput:
        """Logits `(B, S, vocabulary)`; `loss` = cross-entropy at `labels` other than -100 + router losses.

        Args:
            output_router_logits (`bool`, *optional*): Return `router_logits`, `router_indices` and `aux_loss`.
                In training they are recorded, and the losses applied, whatever this says.
        """
        places = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        outputs, fields = self.encode(
            input_ids, attention_mask, inputs_embeds, output_router_logits, **places, **kwargs
        )
        pending = self.begin_balance(outputs, input_ids, attention_mask, inputs_embeds)
        logits = getattr(self, self.lm_head_attribute)(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        loss, aux_loss = self.add_router_losses(loss, pending, labels, num_items_in_batch, labels_are_shifted=True)
        return MoeMaskedLMOutput(loss=loss, logits=logits, aux_loss=aux_loss, **fields)


class MoeEncoderForSequenceClassificationMixin(_EncoderHeadMixin):
    """Classification of whole sequences, from the pooler's output where the dense head reads that."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeEncoderSequenceClassifierOutput:
        """Logits `(B, num_labels)`; `labels` `(B,)` or, for several labels at once, `(B, num_labels)`."""
        places = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        outputs, fields = self.encode(
            input_ids, attention_mask, inputs_embeds, output_router_logits, **places, **kwargs
        )
        pending = self.begin_balance(outputs, input_ids, attention_mask, inputs_embeds)
        if outputs.pooler_output is None:
            logits = self.classifier(outputs.last_hidden_state)  # the head takes the first token itself
        else:
            logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        loss, aux_loss = self.add_router_losses(loss, pending)
        return MoeEncoderSequenceClassifierOutput(loss=loss, logits=logits, aux_loss=aux_loss, **fields)


class MoeEncoderForTokenClassificationMixin(_EncoderHeadMixin):
    """Classification of every token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeTokenClassifierOutput:
        """Logits `(B, S, num_labels)`; `labels` `(B, S)`, -100 is ignored."""
        places = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        outputs, fields = self.encode(
            input_ids, attention_mask, inputs_embeds, output_router_logits, **places, **kwargs
        )
        pending = self.begin_balance(outputs, input_ids, attention_mask, inputs_embeds)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = self.loss_function(logits, labels, self.config) if labels is not None else None
        loss, aux_loss = self.add_router_losses(loss, pending)
        return MoeTokenClassifierOutput(loss=loss, logits=logits, aux_loss=aux_loss, **fields)


class MoeEncoderForQuestionAnsweringMixin(_EncoderHeadMixin):
    """Extractive question answering: where the answer starts and ends."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeQuestionAnsweringOutput:
        """`start_logits` and `end_logits` `(B, S)`; positions `(B,)` outside of the sequence are ignored."""
        places = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        outputs, fields = self.encode(
            input_ids, attention_mask, inputs_embeds, output_router_logits, **places, **kwargs
        )
        pending = self.begin_balance(outputs, input_ids, attention_mask, inputs_embeds)
        start, end = (
            part.squeeze(-1).contiguous() for part in self.qa_outputs(outputs.last_hidden_state).split(1, -1)
        )
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        loss, aux_loss = self.add_router_losses(loss, pending)
        return MoeQuestionAnsweringOutput(loss=loss, start_logits=start, end_logits=end, aux_loss=aux_loss, **fields)
