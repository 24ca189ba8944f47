"""T5's encoder and decoder with MoE blocks in place of feed-forwards. Attention, caches and masks are T5's own.

Shapes: B batch, S sequence (of this stack), T = B * S tokens, D hidden, I intermediate, N experts, K per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm, T5PreTrainedModel, T5Stack
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from hf_moe.experts.dense import DenseExpert
from hf_moe.experts.stacked import StackedExperts
from hf_moe.layers import MoeBlock
from hf_moe.models.modeling import MoeModelMixin, MoePreTrainedMixin, RoutedHiddenStates
from hf_moe.models.t5 import MoeT5Config
from hf_moe.routing.load_balancer import LoadBalancer
from hf_moe.routing.output import RoutingContext


__all__ = ["MoeT5Block", "MoeT5LayerFF", "MoeT5PreTrainedModel", "MoeT5Stack", "MoeT5StackOutput"]


@dataclass
class MoeT5StackOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of one stack; one tensor per MoE layer: `router_logits` `(T, N)`, `router_indices` `(T, K)`."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None
    router_penalties: tuple[torch.Tensor, ...] | None = None


class MoeT5LayerFF(nn.Module):
    """T5's feed-forward sub-layer with a [`MoeBlock`]: x + dropout(MoE(norm(x))).

    Note: T5 also drops channels inside its feed-forward; experts, which any kernel may compute, do not.

    Args:
        config ([`MoeT5Config`]): Of the stack.
        layer_idx (`int`): Index of the layer in it.
    """

    def __init__(self, config: MoeT5Config, layer_idx: int):
        super().__init__()
        self.mlp = MoeBlock(config, layer_idx)
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, hidden_states: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, S, D) -> (B, S, D)`, and the router's state."""
        output, router_state = self.mlp(self.layer_norm(hidden_states), context)
        return hidden_states + self.dropout(output), router_state


class MoeT5Block(T5Block):
    """A layer of either stack; its feed-forward is a [`MoeT5LayerFF`] where the stack's config says so."""

    def __init__(self, config: MoeT5Config, layer_idx: int):
        super().__init__(config, has_relative_attention_bias=layer_idx == 0, layer_idx=layer_idx)
        self.is_last = layer_idx == config.num_layers - 1
        if layer_idx in config.moe_layer_indices:
            self.layer[-1] = MoeT5LayerFF(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor | RoutedHiddenStates,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_decoder_position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        routing_context: RoutingContext | None = None,
        **kwargs,
    ) -> tuple:
        """Self-attention, in the decoder cross-attention, feed-forward; takes and returns `(B, S, D)`, with a router
        state if any, and the position biases that T5's layers share."""
        states, router_state = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        states, position_bias, _ = self.layer[0](
            states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        states, cross_bias = _finite(states), None
        if self.is_decoder and encoder_hidden_states is not None:
            states, cross_bias, _ = self.layer[1](
                states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                position_bias=encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
            states = _finite(states)
        if isinstance(self.layer[-1], MoeT5LayerFF):
            context = (routing_context or RoutingContext())._replace(prev_state=router_state)
            states, router_state = self.layer[-1](states, context)
        else:
            states = self.layer[-1](states)
        states = _finite(states)
        if router_state is None or self.is_last:
            return states, position_bias, cross_bias
        return RoutedHiddenStates(states, router_state), position_bias, cross_bias


def _finite(hidden_states: torch.Tensor) -> torch.Tensor:
    """T5's activations outgrow float16: infinities become its largest values."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    limit = torch.finfo(torch.float16).max - 1000
    return torch.where(hidden_states.isinf(), hidden_states.clamp(-limit, limit), hidden_states)


class MoeT5PreTrainedModel(MoePreTrainedMixin, T5PreTrainedModel):
    """Base of the `moe_t5` classes.

    Note: T5 keeps the output matrices `wo` of dense feed-forwards in float32 when it is loaded in float16. Experts are
    whole in the model's dtype, as their kernels need; load in bfloat16 where that is too narrow.
    """

    config: MoeT5Config
    config_class = MoeT5Config
    _no_split_modules = ["MoeT5Block"]
    _can_record_outputs = {
        **(T5PreTrainedModel._can_record_outputs or {}),
        **MoePreTrainedMixin.ROUTER_RECORDS,
        "hidden_states": OutputRecorder(MoeT5Block, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (StackedExperts, DenseExpert)):
            # As T5's own feed-forwards: N(0, 1 / width of the input).
            for name, parameter in module.named_parameters():
                if not name.endswith("bias"):
                    init.normal_(parameter, std=self.config.initializer_factor * parameter.shape[-1] ** -0.5)

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        """As in transformers, for both stacks: each holds a copy of the config, which its experts read."""
        super().set_experts_implementation(experts_implementation)
        for module in self.modules():
            if isinstance(module, MoeT5Stack):
                module.config._experts_implementation_internal = self.config._experts_implementation


class MoeT5Stack(MoeModelMixin, MoeT5PreTrainedModel, T5Stack):
    """Encoder or decoder; `config` is one of [`~MoeT5Config.stack_config`]."""

    moe_layer_class = MoeT5Block
    layers_attribute = "block"

    def post_init(self) -> None:
        # `T5Stack.__init__` ends here, before weights are initialised.
        for index in range(len(self.block)):
            self.block[index] = MoeT5Block(self.config, index)
        self.load_balancer = LoadBalancer.from_config(self.config) if self.config.moe_layer_indices else None
        if self.load_balancer is not None:
            self.load_balancer.counts_targets = self.is_decoder
        T5Stack.post_init(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeT5StackOutput:
        """T5's forward, with router logits and indices recorded where `output_router_logits`. Tokens that
        `attention_mask` marks as padding are not routed."""
        if (input_ids is None) == (inputs_embeds is None):
            side = "decoder_" if self.is_decoder else ""
            raise ValueError(f"Pass `{side}input_ids` or `{side}inputs_embeds`, and not both.")
        outputs = self.routed_forward(
            output_router_logits,
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        states = outputs.get("hidden_states")
        if states is not None:  # those of layers that hand a router state on hold it too
            states = tuple(s[0] if isinstance(s, tuple) else s for s in states)
        return MoeT5StackOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=states,
            attentions=outputs.get("attentions"),
            cross_attentions=outputs.get("cross_attentions"),
            router_logits=outputs.get("router_logits") or None,
            router_indices=outputs.get("router_indices") or None,
            router_penalties=outputs.get("router_penalties") or None,
        )
