"""What an encoder of BERT's family gains: blocks for feed-forwards and router state. Its heads are in
`encoder_heads.py`.

Embeddings, attention, poolers and heads stay transformers' own. The block takes the place of `intermediate` and of
`output.dense`; the dropout, the residual and the LayerNorm of `output` follow the experts as they follow the dense
feed-forward: x + Dropout(MoE(x)), normalised.

Shapes: B batch, S sequence, T = B * S tokens, D hidden, K per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import can_return_tuple

from hf_moe.layers import MoeBlock
from hf_moe.routing.output import RoutingContext

from .modeling import MoeDecoderLayerMixin, MoeModelMixin, RoutedHiddenStates


__all__ = ["MoeEncoderLayerMixin", "MoeEncoderModelMixin", "MoeEncoderOutput"]


@dataclass
class MoeEncoderOutput(BaseModelOutputWithPooling):
    """Base-model output with the router fields of [`~hf_moe.models.modeling.MoeModelOutput`]."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None
    all_router_logits: tuple[torch.Tensor, ...] | None = None
    router_penalties: tuple[torch.Tensor, ...] | None = None


class MoeEncoderLayerMixin(MoeDecoderLayerMixin):
    """A post-norm encoder layer with a [`MoeBlock`] named `mlp` where the config says so, else the dense layer."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        if self.is_sparse:
            del self.intermediate
            self.output.dense = nn.Identity()

    @property
    def is_sparse(self) -> bool:
        """Whether the feed-forward is a `MoeBlock`."""
        return isinstance(getattr(self, "mlp", None), MoeBlock)

    def forward(
        self,
        hidden_states: torch.Tensor | RoutedHiddenStates,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        routing_context: RoutingContext | None = None,
        **kwargs,
    ) -> torch.Tensor | RoutedHiddenStates:
        """Attention and feed-forward; takes and returns `(B, S, D)`, with a router state if any."""
        hidden_states, router_state = self.unpack(hidden_states)
        hidden_states, _ = self.attention(hidden_states, attention_mask, **kwargs)
        if not self.is_sparse:
            hidden_states = apply_chunking_to_forward(
                self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, hidden_states
            )
            return self.pack(hidden_states, router_state)
        mixed, router_state = self.feed_forward(hidden_states, routing_context, router_state)
        return self.pack(self.output(mixed, hidden_states), router_state)


class MoeEncoderModelMixin(MoeModelMixin):
    """Goes in front of the dense base model."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeEncoderOutput:
        """The dense model's forward, with router logits and indices recorded where `output_router_logits`.

        Raises:
            ValueError: arguments of a decoder (`encoder_hidden_states`, `past_key_values`).
        """
        for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` was passed, but `{self.config.model_type}` is an encoder; leave it out.")
        outputs = self.routed_forward(
            output_router_logits,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MoeEncoderOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **self.routing_fields(outputs),
        )
