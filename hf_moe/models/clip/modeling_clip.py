"""`MoeClipModel`, the drop-in for `CLIPModel`, and an image classifier on its tower.

Shapes: B images, C captions, E embedding, T tokens of a tower, N experts, K per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPForImageClassification, CLIPModel, CLIPOutput
from transformers.utils.generic import can_return_tuple

from hf_moe.models.clip import MoeClipConfig
from hf_moe.models.clip.tower_clip import MoeClipPreTrainedModel, MoeClipTextModel, MoeClipVisionModel
from hf_moe.models.modeling import RouterLossesMixin


__all__ = ["MoeClipForImageClassification", "MoeClipModel"]


@dataclass
class MoeClipOutput(CLIPOutput):
    """CLIP's output. `aux_loss` is the sum of the towers' balance losses, each a mean over its MoE layers; per MoE
    layer of a tower, logits are `(T, N)` and indices `(T, K)`."""

    aux_loss: torch.Tensor | None = None
    text_router_logits: tuple[torch.Tensor, ...] | None = None
    vision_router_logits: tuple[torch.Tensor, ...] | None = None
    text_router_indices: tuple[torch.Tensor, ...] | None = None
    vision_router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeImageClassifierOutput(ImageClassifierOutput):
    """A classifier's output with the router fields of a tower."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


class MoeClipModel(RouterLossesMixin, MoeClipPreTrainedModel, CLIPModel):
    """CLIP whose towers have MoE layers; its `get_text_features`, `get_image_features` and outputs are CLIP's."""

    config: MoeClipConfig
    # The loss is a mean over the pairs of the call, whatever else is in the optimizer step.
    accepts_loss_kwargs = False

    def __init__(self, config: MoeClipConfig):
        super(CLIPModel, self).__init__(config)  # CLIP's own `__init__` would make dense towers
        # `from_pretrained(folder, ...)` sets fields after the config was checked.
        config.validate_architecture()
        text, vision = config.text_config, config.vision_config
        self.projection_dim = config.projection_dim
        self.text_embed_dim, self.vision_embed_dim = text.hidden_size, vision.hidden_size
        self.text_model = MoeClipTextModel._from_config(text)
        self.vision_model = MoeClipVisionModel._from_config(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @property
    def towers(self) -> tuple[Any, Any]:
        """Text tower and image tower."""
        return self.text_model, self.vision_model

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MoeClipOutput:
        """As in CLIP: `logits_per_image` `(B, C)`, and with `return_loss` the contrastive loss, in training with the
        router losses of both towers.

        Args:
            output_router_logits (`bool`, *optional*): Return router logits, indices and `aux_loss`. In training they
                are recorded, and the losses applied, whatever this says.
        """
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_loss=return_loss,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_router_logits=self.wants_routing(output_router_logits),
            **kwargs,
        )
        text, vision = outputs.text_model_output, outputs.vision_model_output
        loss, values = outputs.loss, []
        masks = self.text_model.routing_context(input_ids, attention_mask).token_mask, None
        for tower, recorded, mask in zip(self.towers, (text, vision), masks, strict=True):
            loss, value = _with_router_losses(self, loss, tower, recorded, mask)
            values += [] if value is None else [value.to(outputs.logits_per_text.device)]
        return MoeClipOutput(
            **{**outputs, "loss": loss},
            aux_loss=sum(values[1:], start=values[0]) if values else None,
            text_router_logits=text.all_router_logits,
            vision_router_logits=vision.all_router_logits,
            text_router_indices=text.router_indices,
            vision_router_indices=vision.router_indices,
        )


class MoeClipForImageClassification(RouterLossesMixin, MoeClipPreTrainedModel, CLIPForImageClassification):
    """The image tower and a classifier on the mean of its patches."""

    config: MoeClipConfig
    accepts_loss_kwargs = False  # as above

    def __init__(self, config: MoeClipConfig):
        super(CLIPForImageClassification, self).__init__(config)  # as in `MoeClipModel`
        config.validate_architecture()
        self.num_labels = config.num_labels
        self.vision_model = MoeClipVisionModel._from_config(config.vision_config)
        width = config.vision_config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeImageClassifierOutput:
        """As in CLIP; in training the loss holds the tower's router losses."""
        outputs = self.vision_model(
            pixel_values, output_router_logits=self.wants_routing(output_router_logits), **kwargs
        )
        logits = self.classifier(outputs.last_hidden_state[:, 1:].mean(dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        loss, aux_loss = _with_router_losses(self, loss, self.vision_model, outputs, None)
        return MoeImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.all_router_logits,
            router_indices=outputs.router_indices,
        )


def _with_router_losses(
    model: Any, loss: torch.Tensor | None, tower: Any, outputs: Any, token_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`loss` with the router losses of one tower, and the tower's unweighted balance loss."""
    if not outputs.all_router_logits or not model.adds_router_losses:
        return loss, None
    recorded = (outputs.all_router_logits, outputs.router_indices, outputs.router_penalties)
    return model.add_router_losses(loss, model.begin_balance_of(tower, recorded, token_mask))
