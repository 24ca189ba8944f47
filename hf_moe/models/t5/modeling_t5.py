"""The `moe_t5` models: encoder and decoder, with a language-modelling head, or the encoder alone.

Shapes: B batch, S source length, G target length, T tokens of a stack, D hidden, N experts, K per token, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.models.t5.modeling_t5 import T5EncoderModel, T5ForConditionalGeneration, T5Model
from transformers.utils.generic import can_return_tuple

from hf_moe.models.modeling import RouterLossesMixin
from hf_moe.models.t5 import MoeT5Config
from hf_moe.models.t5.stack_t5 import MoeT5PreTrainedModel, MoeT5Stack, MoeT5StackOutput
from hf_moe.routing.steps import target_mask


__all__ = ["MoeT5EncoderModel", "MoeT5ForConditionalGeneration", "MoeT5Model", "MoeT5PreTrainedModel"]


@dataclass
class MoeSeq2SeqModelOutput(Seq2SeqModelOutput):
    """Base-model output: per MoE layer of each stack, logits `(T, N)` and chosen experts `(T, K)`."""

    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None
    encoder_router_indices: tuple[torch.Tensor, ...] | None = None
    decoder_router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Language-model output. `aux_loss` is `encoder_aux_loss + decoder_aux_loss`, each a mean over the MoE layers of
    its stack and 1 when balanced."""

    aux_loss: torch.Tensor | None = None
    encoder_aux_loss: torch.Tensor | None = None
    decoder_aux_loss: torch.Tensor | None = None
    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None
    encoder_router_indices: tuple[torch.Tensor, ...] | None = None
    decoder_router_indices: tuple[torch.Tensor, ...] | None = None


class _StacksMixin:
    """Both stacks, and how an input passes through them."""

    def add_stacks(self, config: MoeT5Config) -> None:
        # `from_pretrained(folder, num_experts_per_tok=...)` sets fields after the config was checked.
        config.validate_architecture()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = MoeT5Stack(config.stack_config(is_decoder=False))
        self.decoder = MoeT5Stack(config.stack_config(is_decoder=True))

    def encode(
        self,
        encoder_outputs: Any,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        **kwargs,
    ) -> MoeT5StackOutput | BaseModelOutput:
        """The encoder's output, unless it is given."""
        if encoder_outputs is None:
            return self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        if isinstance(encoder_outputs, BaseModelOutput | MoeT5StackOutput):
            return encoder_outputs
        last, states, attentions = (*encoder_outputs[:3], None, None)[:3]
        return BaseModelOutput(last_hidden_state=last, hidden_states=states, attentions=attentions)

    @staticmethod
    def common_fields(encoded: Any, decoded: MoeT5StackOutput) -> dict[str, Any]:
        """What the outputs of both classes hold."""
        return {
            "past_key_values": decoded.past_key_values,
            "decoder_hidden_states": decoded.hidden_states,
            "decoder_attentions": decoded.attentions,
            "cross_attentions": decoded.cross_attentions,
            "encoder_last_hidden_state": encoded.last_hidden_state,
            "encoder_hidden_states": encoded.hidden_states,
            "encoder_attentions": encoded.attentions,
            "encoder_router_logits": encoded.get("router_logits"),
            "decoder_router_logits": decoded.router_logits,
            "encoder_router_indices": encoded.get("router_indices"),
            "decoder_router_indices": decoded.router_indices,
        }


class MoeT5Model(_StacksMixin, MoeT5PreTrainedModel, T5Model):
    """Encoder and decoder without a head."""

    def __init__(self, config: MoeT5Config):
        super(T5Model, self).__init__(config)  # T5's own `__init__` would make dense stacks
        self.add_stacks(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeSeq2SeqModelOutput:
        """As in T5; `output_router_logits` records the routing of both stacks."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        kwargs["output_router_logits"] = output_router_logits
        encoded = self.encode(encoder_outputs, input_ids, attention_mask, inputs_embeds, **kwargs)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return MoeSeq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state, **self.common_fields(encoded, decoded)
        )


class MoeT5ForConditionalGeneration(_StacksMixin, RouterLossesMixin, MoeT5PreTrainedModel, T5ForConditionalGeneration):
    """Encoder, decoder and a language-modelling head; beams and caches are those of T5."""

    def __init__(self, config: MoeT5Config):
        super(T5ForConditionalGeneration, self).__init__(config)  # as in `MoeT5Model`
        self.model_dim = config.d_model
        self.add_stacks(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MoeSeq2SeqLMOutput:
        """Logits `(B, G, V)`; `loss` = cross-entropy + router losses of both stacks where `labels` are given.

        Args:
            labels (`torch.LongTensor` of shape `(B, G)`, *optional*): Targets; -100 is ignored. Without
                `decoder_attention_mask`, positions behind the last target of a row count as padding: nothing can
                attend to them, and they are not routed.
            output_router_logits (`bool`, *optional*): Return router logits, indices and `aux_loss`. In training they
                are recorded, and the losses applied, whatever this says.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Targets of the whole optimizer step, which the
                cross-entropy is divided by (T5 in transformers ignores it).
        """
        kwargs["output_router_logits"] = self.wants_routing(output_router_logits)
        encoded = self.encode(encoder_outputs, input_ids, attention_mask, inputs_embeds, **kwargs)
        # While text is generated, the encoder ran long ago, and may have run for fewer rows than there are beams.
        counts = encoder_outputs is None or labels is not None
        pending = [self._begin(self.encoder, encoded, attention_mask) if counts else None]
        if labels is not None:
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self._shift_right(labels)
            if decoder_attention_mask is None and past_key_values is None:
                decoder_attention_mask = target_mask(labels)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        pending.append(self._begin(self.decoder, decoded, decoder_attention_mask))
        hidden_states = decoded.last_hidden_state
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.model_dim**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:  # targets as they are: the decoder's inputs were shifted instead
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=labels.contiguous(),
                num_items_in_batch=num_items_in_batch,
            )
        losses = []
        for part in pending:
            loss, value = self.add_router_losses(loss, part, labels, num_items_in_batch, labels_are_shifted=True)
            losses.append(value)
        present = [value.to(logits.device) for value in losses if value is not None]
        return MoeSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            aux_loss=sum(present[1:], start=present[0]) if present else None,
            encoder_aux_loss=losses[0],
            decoder_aux_loss=losses[1],
            **self.common_fields(encoded, decoded),
        )

    def _begin(self, stack: MoeT5Stack, outputs: Any, attention_mask: torch.Tensor | None) -> Any:
        if not outputs.get("router_logits") or not self.adds_router_losses:
            return None
        recorded = (outputs.router_logits, outputs.router_indices, outputs.router_penalties)
        # Of the inputs only the shape is asked for, which hidden states have too.
        context = stack.routing_context(None, attention_mask, outputs.last_hidden_state)
        return self.begin_balance_of(stack, recorded, context.token_mask)


class MoeT5EncoderModel(MoeT5PreTrainedModel, T5EncoderModel):
    """The encoder alone; see [`MoeT5StackOutput`] for what it returns."""

    def __init__(self, config: MoeT5Config):
        super(T5EncoderModel, self).__init__(config)  # as in `MoeT5Model`
        config.validate_architecture()
        config.use_cache = config.is_encoder_decoder = False
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = MoeT5Stack(config.stack_config(is_decoder=False))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeT5StackOutput:
        """As in T5, with the routing where `output_router_logits`."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            **kwargs,
        )
