"""GPT-2's block in the layout of [`MoeDecoderLayerMixin`]: other attribute names, other argument order."""

import torch

from hf_moe.models.modeling import MoeDecoderLayerMixin, RoutedHiddenStates


__all__ = ["MoeGPT2BlockMixin"]


class MoeGPT2BlockMixin(MoeDecoderLayerMixin):
    """A GPT-2 block whose `mlp` may be a `MoeBlock`. Residual dropout follows the experts as it follows the dense
    feed-forward."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.expert_dropout = torch.nn.Dropout(config.resid_pdrop if layer_idx in config.moe_layer_indices else 0.0)

    def forward(
        self,
        hidden_states: torch.Tensor | RoutedHiddenStates,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        use_cache: bool | None = False,
        routing_context=None,
        **kwargs,
    ) -> torch.Tensor | RoutedHiddenStates:
        """As [`MoeDecoderLayerMixin.forward`]."""
        if encoder_hidden_states is not None:
            raise ValueError("`encoder_hidden_states` was passed, but `moe_gpt2` is decoder-only.")
        hidden_states, router_state = self.unpack(hidden_states)
        residual = hidden_states
        hidden_states, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + residual
        residual = hidden_states
        hidden_states, router_state = self.feed_forward(self.ln_2(hidden_states), routing_context, router_state)
        return self.pack(residual + self.expert_dropout(hidden_states), router_state)
