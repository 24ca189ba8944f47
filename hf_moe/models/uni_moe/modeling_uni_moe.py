"""Uni-MoE with its head, whose outputs carry the routing.

Shapes: B batch, S sequence (media included), M media items, D hidden, N experts, K per token.
"""

from typing import Any

import torch
from torch import nn
from transformers.generation.utils import GenerationMixin
from transformers.utils.generic import can_return_tuple

from hf_moe.models.modeling import LanguageHeadMixin, MoeCausalLMOutput

from .configuration_uni_moe import UniMoeConfig
from .splice import INPUTS, expand_media
from .trunk_uni_moe import UniMoeModel, UniMoePreTrainedModel


__all__ = ["UniMoeForConditionalGeneration", "UniMoeModel", "UniMoePreTrainedModel"]


class UniMoeForConditionalGeneration(LanguageHeadMixin, UniMoePreTrainedModel, GenerationMixin):
    """Uni-MoE ([2405.11273](https://huggingface.co/papers/2405.11273)): answers in text about text, images, videos,
    speech and sounds.

    Inputs come from [`UniMoeProcessor`]. One is made from a dense language model and pretrained encoders by
    [`upcycle_uni_moe`], and from several tuned models by [`combine_uni_moe`].

    Example:

    ```python
    >>> inputs = processor(text="<speech>What was said?", speech=[waveform], return_tensors="pt")
    >>> answer = model.generate(**inputs, max_new_tokens=20)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UniMoeConfig):
        super().__init__(config)
        self.model = UniMoeModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self.refuse_pooled_losses()
        self.post_init()

    @property
    def router_trunk(self) -> Any:
        """The stack of layers the router losses are about."""
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the language model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the language model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_values: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeCausalLMOutput:
        """Next-token logits; `loss` = cross-entropy + router losses where `labels` are given. Labels at placeholders
        do not count, whatever they are. Media: see [`UniMoeModel.forward`].

        Args:
            output_router_logits (`bool`, *optional*): Return `router_logits`, `router_indices` and `aux_loss`.
                In training they are recorded, and the losses applied, whatever this says.

        Raises:
            ValueError: see [`UniMoeModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            audio_values=audio_values,
            audio_mask=audio_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=self.wants_routing(output_router_logits),
            **kwargs,
        )
        if labels is not None and input_ids is not None:
            for token_id in self.config.token_ids.values():
                labels = labels.masked_fill(input_ids == token_id, -100)
        inputs = (input_ids, attention_mask, inputs_embeds)
        return self.language_output(outputs, inputs, labels, logits_to_keep, kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration: bool | None = False, **kwargs):
        """As in transformers; media go into the first step only, later ones find them in the cache."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs = {name: value for name, value in kwargs.items() if name not in (*INPUTS.values(), "audio_mask")}
        plain: Any = super()
        return plain.prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        if expand_size > 1 and input_ids is not None:
            media = expand_media(self.config, input_ids, kwargs, expand_size)
            kwargs = {name: value for name, value in kwargs.items() if name not in media}
        else:
            media = {}
        plain: Any = super()
        input_ids, kwargs = plain._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **media}
