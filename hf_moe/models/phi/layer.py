"""Phi's layer in the layout of [`MoeDecoderLayerMixin`]: attention and feed-forward side by side."""

import torch

from hf_moe.models.modeling import MoeDecoderLayerMixin, RoutedHiddenStates


__all__ = ["MoePhiLayerMixin"]


class MoePhiLayerMixin(MoeDecoderLayerMixin):
    """A Phi layer whose `mlp` may be a `MoeBlock`: the routers see what the attention sees."""

    def forward(
        self,
        hidden_states: torch.Tensor | RoutedHiddenStates,
        attention_mask: torch.Tensor | None = None,
        routing_context=None,
        **kwargs,
    ) -> torch.Tensor | RoutedHiddenStates:
        """As [`MoeDecoderLayerMixin.forward`]."""
        residual, router_state = self.unpack(hidden_states)
        normalised = self.input_layernorm(residual)
        attended, _ = self.self_attn(hidden_states=normalised, attention_mask=attention_mask, **kwargs)
        output, router_state = self.feed_forward(normalised, routing_context, router_state)
        return self.pack(self.resid_dropout(attended) + self.resid_dropout(output) + residual, router_state)
