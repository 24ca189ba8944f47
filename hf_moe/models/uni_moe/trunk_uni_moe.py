"""Encoders and connectors in front of a MoE language model, without a head.

Shapes: B batch, S sequence (media included), M media items, D hidden, N experts, K per token.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from hf_moe.models.modeling import MoeModelOutput, MoePreTrainedMixin

from .configuration_uni_moe import ENCODERS, UniMoeConfig
from .connectors import QueryConnector, build_connector
from .encoders import audio_features, build_encoder, image_features, running, speech_features, video_features
from .splice import INPUTS, check_inputs, splice


__all__ = ["UniMoeModel", "UniMoePreTrainedModel"]


class UniMoePreTrainedModel(MoePreTrainedMixin, PreTrainedModel):
    """Base of the `uni_moe` classes."""

    config: UniMoeConfig
    config_class = UniMoeConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    # Beside those of the encoders and the language model.
    _no_split_modules = ["Blip2QFormerLayer", "WhisperDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QueryConnector):
            init.normal_(module.queries, mean=0.0, std=module.std)

    def _grouped_mm_can_dispatch(self) -> bool:
        # The language model asks for itself; the encoders have no experts.
        return super(MoePreTrainedMixin, self)._grouped_mm_can_dispatch()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; frozen encoders stay frozen."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # Loading makes parameters anew, and they then want gradients.
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_encoders()
        return loaded

    def freeze_encoders(self) -> None:
        """Turns the gradients of the encoders off where the config says so."""
        trunk: Any = self.base_model
        if self.config.freeze_encoders:
            for encoder in trunk.encoders().values():
                encoder.requires_grad_(False)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        # Encoders and connectors are small beside the language model, and most run without gradients.
        trunk: Any = self.base_model
        trunk.language_model._set_gradient_checkpointing(*args, **kwargs)


class UniMoeModel(UniMoePreTrainedModel):
    """Encoders, connectors and the MoE language model, without a head."""

    def __init__(self, config: UniMoeConfig):
        super().__init__(config)
        for encoder in dict.fromkeys(ENCODERS.values()):
            part = getattr(config, f"{encoder}_config")
            if part is not None:
                connector = "image" if encoder == "vision" else encoder
                self.add_module(f"{encoder}_encoder", build_encoder(part))
                self.add_module(f"{connector}_connector", build_connector(config, connector))
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        self.freeze_encoders()

    def encoders(self) -> dict[str, nn.Module]:
        """The encoders there are: `"vision"`, `"speech"`, `"audio"`."""
        return {
            name: getattr(self, f"{name}_encoder") for name in ENCODERS.values() if f"{name}_encoder" in self._modules
        }

    def connectors(self) -> dict[str, nn.Module]:
        """The connectors there are: `"image"`, `"speech"`, `"audio"`."""
        names = ("image", "speech", "audio")
        return {name: getattr(self, f"{name}_connector") for name in names if f"{name}_connector" in self._modules}

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def encode(self, modality: str, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the language model for the media of one modality.

        Args:
            modality (`str`): `"image"`, `"video"`, `"speech"` or `"audio"`.
            values (`torch.Tensor`): Images `(M, 3, H, W)`, videos `(M, F, 3, H, W)`, Whisper's features of 30 s
                segments `(M, mels, frames)`, or spectrograms `(M, frames, mels)`.
            mask (`torch.Tensor` of shape `(M, frames)`, *optional*): 1 where a spectrogram has sound.

        Returns:
            `torch.Tensor` of shape `(M, rows, D)`.

        Raises:
            ValueError: a modality without encoder.
        """
        check_inputs(self.config, {modality: values}, {})
        encoder = getattr(self, f"{ENCODERS[modality]}_encoder")
        connector = getattr(self, f"{'image' if modality == 'video' else modality}_connector")
        rows, row_mask = None, None
        with running(encoder, self.config.freeze_encoders):
            if modality == "image":
                rows = image_features(encoder, values, self.config.vision_feature_layer)
            elif modality == "video":
                rows = video_features(encoder, values, self.config.vision_feature_layer, self.config.video_pool)
            elif modality == "speech":
                rows = speech_features(encoder, values)
            else:
                rows, row_mask = audio_features(encoder, values, mask)
        return connector(rows.to(next(connector.parameters()).dtype), row_mask)

    def _with_every_connector(self, embeds: torch.Tensor, media: Any) -> torch.Tensor:
        """Under data parallelism every rank has to give every connector a gradient, and the batch of one may have no
        speech while that of another has."""
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (parallel and self.training and torch.is_grad_enabled()):
            return embeds
        read = {"image" if modality == "video" else modality for modality in media}
        idle = [connector for name, connector in self.connectors().items() if name not in read]
        parameters = [p for connector in idle for p in connector.parameters() if p.requires_grad]
        return embeds + sum((0 * p.sum()).to(embeds) for p in parameters) if parameters else embeds

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
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeModelOutput:
        """Hidden states of the language model, with `router_logits` and `router_indices` where
        `output_router_logits`. Media are in the order of their placeholders, over the whole batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(M, 3, H, W)`, *optional*): Images.
            pixel_values_videos (`torch.Tensor` of shape `(M, F, 3, H, W)`, *optional*): Videos.
            input_features (`torch.Tensor` of shape `(M, mels, frames)`, *optional*): Speech, in segments of 30 s.
            audio_values (`torch.Tensor` of shape `(M, frames, mels)`, *optional*): Sounds, in segments.
            audio_mask (`torch.Tensor` of shape `(M, frames)`, *optional*): Where they are no padding.

        Raises:
            ValueError: media of a modality without encoder; placeholders without media, or another number of them
                than the connector gives.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        given = dict(zip(INPUTS, (pixel_values, pixel_values_videos, input_features, audio_values), strict=True))
        media: dict[str, torch.Tensor] = {name: values for name, values in given.items() if values is not None}
        check_inputs(self.config, media, kwargs)
        embeds: Any = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        rows = {name: self.encode(name, values, audio_mask) for name, values in media.items()}
        embeds = self._with_every_connector(splice(self.config, input_ids, embeds, rows, past_key_values), media)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            output_router_logits=output_router_logits,
            routing_input_ids=input_ids,
            **kwargs,
        )
