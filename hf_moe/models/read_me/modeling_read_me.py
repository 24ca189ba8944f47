"""Read-ME: a Llama whose layers all follow one routing decision, made before the first of them (2410.19123).

Shapes: B batch, S sequence, T = B * S tokens, D hidden, N experts.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

from hf_moe.models.modeling import MoeDecoderLayerMixin, MoePreTrainedMixin
from hf_moe.routing.output import RoutingContext

from .cache import extend_cache
from .configuration_read_me import ReadMeConfig
from .feed_forward import ReadMeFeedForward
from .outputs import ReadMeCausalLMOutput, ReadMeModelOutput
from .router import ReadMeRouter


__all__ = ["ReadMeForCausalLM", "ReadMeModel", "ReadMePreTrainedModel"]


class ReadMeDecoderLayer(MoeDecoderLayerMixin, LlamaDecoderLayer):
    """A Llama layer with [`ReadMeFeedForward`] as its `mlp`."""

    def __init__(self, config: ReadMeConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()  # Llama's own would build the dense feed-forward
        self.hidden_size = config.hidden_size
        self.is_last = layer_idx == config.num_hidden_layers - 1
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = ReadMeFeedForward(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def feed_forward(
        self, hidden_states: torch.Tensor, context: RoutingContext | None, router_state: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """`mlp`; there is no state to hand on, all layers get the same `context`."""
        return self.mlp(hidden_states, context), None


class ReadMePreTrainedModel(MoePreTrainedMixin, LlamaPreTrainedModel):
    """Base of the `read_me` classes."""

    config: ReadMeConfig
    config_class = ReadMeConfig
    _no_split_modules = ["ReadMeDecoderLayer", "ReadMeRouter"]
    _can_record_outputs = {"hidden_states": ReadMeDecoderLayer, "attentions": LlamaAttention}
    # Half precision would let rounding decide between experts.
    _keep_in_fp32_modules_strict = {r"router(?=\.)", r"mlp\.gate(?=\.)"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ReadMeFeedForward):
            module.reset_masks()

    def _grouped_mm_can_dispatch(self) -> bool:
        # transformers asks when it chooses the experts implementation, and takes "eager" where it was not asked for.
        config: Any = self.config
        widths = [config.hidden_size, *config.expert_sizes]
        if any(width % 8 for width in widths):  # 16 bytes in half precision
            raise ValueError(
                '`experts_implementation="grouped_mm"` needs `hidden_size` and `expert_sizes` to be multiples of 8, '
                f'got {sorted(set(widths))}. Convert with `multiple_of=8`, or use "batched_mm" or "eager".'
            )
        return LlamaPreTrainedModel._grouped_mm_can_dispatch(self)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; the router's embedding gets rows for the same tokens."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        router: Any = self.base_model.router
        if router.embed_tokens.num_embeddings != embeddings.num_embeddings:
            trained, count = router.embed_tokens.weight.requires_grad, embeddings.num_embeddings
            resized = self._get_resized_embeddings(router.embed_tokens, count, mean_resizing=mean_resizing)
            router.embed_tokens = resized.requires_grad_(trained)
        return embeddings

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, *args, **kwargs):
        """As in transformers: routing happens outside the layers that are computed again."""
        LlamaPreTrainedModel.activation_checkpointing_enable(self, activation_checkpointing_kwargs, *args, **kwargs)


class ReadMeModel(ReadMePreTrainedModel, LlamaModel):
    """The decoder without a head: first the router, then the layers.

    Args:
        config ([`ReadMeConfig`]): Sizes.
    """

    def __init__(self, config: ReadMeConfig):
        config.validate_architecture()  # `from_pretrained(folder, num_experts=...)` sets fields after the first check
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.router = ReadMeRouter(config)
        self.layers = nn.ModuleList([ReadMeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> ReadMeModelOutput:
        """Llama's forward after one pass of the router, whose keys and values are kept in the same cache.

        The argmax gives the router no gradient. It is computed without a graph unless `output_router_logits`.

        Raises:
            ValueError: `inputs_embeds` without `input_ids`.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(
                "`read_me` routes by token ids, so it takes `input_ids` and no `inputs_embeds`. Pass the ids."
            )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            extend_cache(past_key_values, self.config)
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            router_logits = self.router(input_ids, attention_mask, position_ids, past_key_values)  # (B, S, N)
        kwargs["routing_context"] = self.routing_context(input_ids, attention_mask, router_logits.detach())
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return ReadMeModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=router_logits if wanted else None,
        )

    def routing_context(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, router_logits: torch.Tensor
    ) -> RoutingContext:
        """What every layer gets: the router's logits, and which tokens are padding and visit no expert."""
        batch, sequence = input_ids.shape
        token_mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -sequence:].reshape(-1).bool()
        return RoutingContext(input_ids.reshape(-1), token_mask, batch, sequence, router_logits.flatten(0, 1))


class ReadMeForCausalLM(ReadMePreTrainedModel, GenerationMixin):
    """Language model of `read_me`.

    Args:
        config ([`ReadMeConfig`]): Sizes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ReadMeConfig):
        super().__init__(config)
        self.model = ReadMeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        routing_only: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> ReadMeCausalLMOutput:
        """Next-token logits; `loss` where `labels` are given. The loss gives the router no gradient.

        Args:
            output_router_logits (`bool`, *optional*): Return `router_logits` `(B, S, N)`.
            routing_only (`bool`, defaults to `False`): Run the router alone and return its logits: what is needed to
                fetch experts ahead, or to train the router.
        """
        if routing_only:
            if input_ids is None:
                raise ValueError("`routing_only=True` needs `input_ids`: the router reads nothing else.")
            return ReadMeCausalLMOutput(router_logits=self.model.router(input_ids, attention_mask, position_ids))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ReadMeCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args, **kwargs) -> Any:
        generation: Any = super()
        prepared = generation._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if isinstance(model_kwargs.get("past_key_values"), Cache):
            extend_cache(model_kwargs["past_key_values"], self.config)
        return prepared
