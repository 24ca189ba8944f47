"""One tower and its projection into the space both share.

Shapes: B batch, E embedding.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import (
    CLIPTextModelOutput,
    CLIPTextModelWithProjection,
    CLIPVisionModelOutput,
    CLIPVisionModelWithProjection,
)
from transformers.utils.generic import can_return_tuple

from hf_moe.models.clip import MoeClipTextConfig, MoeClipVisionConfig
from hf_moe.models.clip.tower_clip import MoeClipPreTrainedModel, MoeClipTextModel, MoeClipVisionModel


__all__ = ["MoeClipTextModelWithProjection", "MoeClipVisionModelWithProjection"]


class MoeClipTextModelWithProjection(MoeClipPreTrainedModel, CLIPTextModelWithProjection):
    """Captions to embeddings `(B, E)`."""

    config: MoeClipTextConfig
    config_class = MoeClipTextConfig

    def __init__(self, config: MoeClipTextConfig):
        super(CLIPTextModelWithProjection, self).__init__(config)  # CLIP's own `__init__` would make a dense tower
        self.text_model = MoeClipTextModel._from_config(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> CLIPTextModelOutput:
        """As in CLIP."""
        return super().forward(input_ids=input_ids, **kwargs)


class MoeClipVisionModelWithProjection(MoeClipPreTrainedModel, CLIPVisionModelWithProjection):
    """Images to embeddings `(B, E)`."""

    config: MoeClipVisionConfig
    config_class = MoeClipVisionConfig

    def __init__(self, config: MoeClipVisionConfig):
        super(CLIPVisionModelWithProjection, self).__init__(config)  # as above
        self.vision_model = MoeClipVisionModel._from_config(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> CLIPVisionModelOutput:
        """As in CLIP."""
        return super().forward(pixel_values=pixel_values, **kwargs)
