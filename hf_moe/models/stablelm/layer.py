"""StableLM's layer in the layout of [`MoeDecoderLayerMixin`]: dropout, and attention beside the feed-forward."""

import torch

from hf_moe.models.modeling import MoeDecoderLayerMixin, RoutedHiddenStates


__all__ = ["MoeStableLmLayerMixin"]


class MoeStableLmLayerMixin(MoeDecoderLayerMixin):
    """A StableLM layer whose `mlp` may be a `MoeBlock`. With `use_parallel_residual` attention and feed-forward read
    the same normalised input."""

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
        residual = residual + attended
        if not self.use_parallel_residual:
            normalised = self.post_attention_layernorm(residual)
        output, router_state = self.feed_forward(normalised, routing_context, router_state)
        return self.pack(residual + self.dropout(output), router_state)
