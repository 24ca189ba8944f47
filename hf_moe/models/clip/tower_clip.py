"""CLIP's towers with MoE blocks in place of feed-forwards. Embeddings, attention and masks are CLIP's own.

Shapes: B batch, S sequence (tokens, or patches and the class token), T = B * S, D hidden, N experts, K per token.
"""

from typing import Any

import torch
from transformers.models.clip.modeling_clip import (
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPTextModel,
    CLIPVisionModel,
)
from transformers.utils.generic import can_return_tuple

from hf_moe.models.clip import MoeClipConfig, MoeClipTextConfig, MoeClipVisionConfig
from hf_moe.models.encoder import MoeEncoderOutput
from hf_moe.models.modeling import MoeDecoderLayerMixin, MoeModelMixin, MoePreTrainedMixin, RoutedHiddenStates
from hf_moe.routing.output import RoutingContext


__all__ = ["MoeClipEncoderLayer", "MoeClipPreTrainedModel", "MoeClipTextModel", "MoeClipVisionModel"]


class _IndexedLayer(CLIPEncoderLayer):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config)


class MoeClipEncoderLayer(MoeDecoderLayerMixin, _IndexedLayer):
    """A layer of either tower whose `mlp` is a `MoeBlock` where the tower's config says so."""

    def forward(
        self,
        hidden_states: torch.Tensor | RoutedHiddenStates,
        attention_mask: torch.Tensor | None = None,
        routing_context: RoutingContext | None = None,
        **kwargs,
    ) -> torch.Tensor | RoutedHiddenStates:
        """Attention and feed-forward, both residual; takes and returns `(B, S, D)`, with a router state if any."""
        states, router_state = self.unpack(hidden_states)
        mixed, _ = self.self_attn(hidden_states=self.layer_norm1(states), attention_mask=attention_mask, **kwargs)
        states = states + mixed
        mixed, router_state = self.feed_forward(self.layer_norm2(states), routing_context, router_state)
        return self.pack(states + mixed, router_state)


class MoeClipPreTrainedModel(MoePreTrainedMixin, CLIPPreTrainedModel):
    """Base of the `moe_clip` classes."""

    config: Any
    config_class = MoeClipConfig
    _no_split_modules = ["CLIPTextEmbeddings", "MoeClipEncoderLayer", "CLIPVisionEmbeddings"]
    _can_record_outputs = {
        **(CLIPPreTrainedModel._can_record_outputs or {}),
        **MoePreTrainedMixin.ROUTER_RECORDS,
        "hidden_states": MoeClipEncoderLayer,
    }

    def _grouped_mm_can_dispatch(self) -> bool:
        towers = [getattr(self.config, name, None) for name in ("text_config", "vision_config")]
        if None in towers:
            return super()._grouped_mm_can_dispatch()
        return True  # each tower asks for itself


class _MoeTower(MoeModelMixin):
    moe_layer_class = MoeClipEncoderLayer
    layers_attribute = "encoder.layers"

    def tower_output(self, outputs: Any) -> MoeEncoderOutput:
        return MoeEncoderOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **self.routing_fields(outputs),
        )


class MoeClipTextModel(_MoeTower, MoeClipPreTrainedModel, CLIPTextModel):
    """The text tower. Padding is not routed."""

    config: MoeClipTextConfig
    config_class = MoeClipTextConfig
    input_modalities = ("text",)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeEncoderOutput:
        """As in CLIP, with router logits and indices recorded where `output_router_logits`."""
        if input_ids is None:
            raise ValueError("`input_ids` must be given: CLIP reads the place of the last token in them.")
        return self.tower_output(
            self.routed_forward(
                output_router_logits,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        )


class MoeClipVisionModel(_MoeTower, MoeClipPreTrainedModel, CLIPVisionModel):
    """The image tower; takes the place of a `CLIPVisionModel` wherever there is one."""

    config: MoeClipVisionConfig
    config_class = MoeClipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeEncoderOutput:
        """As in CLIP, with router logits and indices recorded where `output_router_logits`."""
        if pixel_values is None:
            raise ValueError("`pixel_values` must be given.")
        return self.tower_output(
            self.routed_forward(
                output_router_logits,
                pixel_values=pixel_values,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **kwargs,
            )
        )

    def post_init(self) -> None:
        super().post_init()
        if self.config.num_moe_layers:
            self.load_balancer.tokens_per_image = self.embeddings.num_positions

    def routing_context(self, *inputs: Any) -> RoutingContext:
        """Every patch is routed, and has no id."""
        return RoutingContext()
