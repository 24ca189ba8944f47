"""MoE-LLaVA: transformers' LLaVA around a MoE language model, whose routing reaches the outputs.

Shapes: B batch, S sequence (image positions included), T = B * S tokens, D hidden, N experts, K per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from hf_moe.models.modeling import LanguageHeadMixin, MoeCausalLMOutput, MoeModelOutput, MoePreTrainedMixin

from .configuration_moe_llava import MoeLlavaConfig
from .images import check_image_tokens, check_modalities


__all__ = [
    "MoeLlavaCausalLMOutput",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeLlavaModelOutput",
    "MoeLlavaPreTrainedModel",
]


@dataclass
class MoeLlavaModelOutput(MoeModelOutput):
    """Base-model output: that of the language model, with its routing, and `image_hidden_states` (rows, D)."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MoeLlavaCausalLMOutput(MoeCausalLMOutput):
    """Output with a head: `loss`, `aux_loss`, `router_logits`, `router_indices` and `image_hidden_states`."""

    image_hidden_states: torch.Tensor | None = None


class MoeLlavaPreTrainedModel(MoePreTrainedMixin, LlavaPreTrainedModel):
    """Base of the `moe_llava` classes."""

    config: MoeLlavaConfig
    config_class = MoeLlavaConfig

    def _grouped_mm_can_dispatch(self) -> bool:
        # The language model asks for itself; the tower has no experts.
        return super(MoePreTrainedMixin, self)._grouped_mm_can_dispatch()


class MoeLlavaModel(MoeLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and MoE language model, without a head."""

    def __init__(self, config: MoeLlavaConfig):
        vision: Any = config.vision_config
        tower: Any = MODEL_MAPPING[type(vision)]
        if not tower._can_set_experts_implementation():
            # What was asked for the experts was handed to every part, and a tower without any refuses it.
            vision._experts_implementation = None
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeLlavaModelOutput:
        """As `LlavaModel.forward`, with `router_logits` and `router_indices` where `output_router_logits`.

        Raises:
            ValueError: image tokens without images, or another number of them than the tower gives; inputs of a
                modality that has no encoder here.
        """
        check_modalities(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("`pixel_values` and `mm_encoder_outputs` exclude each other: give one of them.")
        embeds: Any = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            encode: Any = self.get_image_features
            images = encode(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
        rows = None if images is None else images.pooler_output  # one (patches, D) per image
        check_image_tokens(self.config, input_ids, rows, past_key_values)
        if rows is not None:
            rows = torch.cat(list(rows)).to(embeds.device, embeds.dtype)  # (rows, D)
            ids: Any = input_ids  # LLaVA's own search takes `None` too
            places = self.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=rows)
            embeds = embeds.masked_scatter(places, rows)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            output_router_logits=output_router_logits,
            routing_input_ids=input_ids,
            **kwargs,
        )
        return MoeLlavaModelOutput(**outputs, image_hidden_states=rows)


class MoeLlavaForConditionalGeneration(LanguageHeadMixin, MoeLlavaPreTrainedModel, LlavaForConditionalGeneration):
    """MoE-LLaVA ([2401.15947](https://huggingface.co/papers/2401.15947)): answers in text about images and text.

    Used like transformers' `LlavaForConditionalGeneration`, with the same processor. One is made from a dense LLaVA by
    [`upcycle`] or [`upcycle_llava`].
    """

    def __init__(self, config: MoeLlavaConfig):
        # Past the dense class, which would make a dense model first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MoeLlavaModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self.refuse_pooled_losses()
        self.post_init()

    @property
    def router_trunk(self) -> Any:
        """The stack of layers the router losses are about."""
        return self.model.language_model

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeLlavaCausalLMOutput:
        """Next-token logits; `loss` = cross-entropy + router losses where `labels` are given. Labels at image tokens
        do not count, whatever they are.

        Args:
            output_router_logits (`bool`, *optional*): Return `router_logits`, `router_indices` and `aux_loss`.
                In training they are recorded, and the losses applied, whatever this says.

        Raises:
            ValueError: see [`MoeLlavaModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=self.wants_routing(output_router_logits),
            **kwargs,
        )
        if labels is not None and input_ids is not None:
            labels = labels.masked_fill(input_ids == self.config.image_token_index, -100)
        inputs = (input_ids, attention_mask, inputs_embeds)
        images = {"image_hidden_states": outputs.image_hidden_states}
        return self.language_output(outputs, inputs, labels, logits_to_keep, kwargs, MoeLlavaCausalLMOutput, **images)
