"""What every MoE backbone adds to its dense model: blocks for feed-forwards, router state, router losses.

A backbone file subclasses the dense classes with these mixins in front. Attention, caches, masks, generation and
attention backends stay transformers' own.

Shapes: B batch, S sequence, T = B * S tokens, D hidden, N experts, K per token.
"""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from hf_moe.experts.stacked import StackedExperts
from hf_moe.experts.zero_computation import ZeroComputationExperts
from hf_moe.layers import MoeBlock
from hf_moe.routing.base import BaseRouter
from hf_moe.routing.load_balancer import LayerRouting, LoadBalancer, PendingBalance
from hf_moe.routing.output import RoutingContext


__all__ = [
    "MoeDecoderLayerMixin",
    "MoeForCausalLMMixin",
    "MoeForSequenceClassificationMixin",
    "MoeForTokenClassificationMixin",
    "MoeModelMixin",
    "MoePreTrainedMixin",
    "MoeSequenceClassifierOutput",
    "MoeTokenClassifierOutput",
    "RoutedHiddenStates",
]


@dataclass
class MoeModelOutput(MoeModelOutputWithPast):
    """Base-model output. `router_indices` is a tuple, one per MoE layer, of int64 tensors of shape `(T, K)`.

    `all_router_logits` are `(T, N)`, zero-computation experts included. `router_logits` here are those of the
    feed-forward experts alone: TRL computes an auxiliary loss from a base model's output, and fails on more columns
    than `config.num_experts`. Outputs of heads have all of them in `router_logits`.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    all_router_logits: tuple[torch.Tensor, ...] | None = None
    router_penalties: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """Language-model output; `aux_loss` is the unweighted load-balance loss, a mean over MoE layers."""

    router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Sequence-classification output with the router fields of [`MoeCausalLMOutput`]."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoeTokenClassifierOutput(TokenClassifierOutput):
    """Token-classification output with the router fields of [`MoeCausalLMOutput`]."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


class RoutedHiddenStates(NamedTuple):
    """Hidden states `(B, S, D)` on their way to the next layer together with the router state `(T, ...)`.

    Handed on positionally, so that gradient checkpointing, `device_map` and compilation see ordinary data. Only
    layers whose router carries state produce it; the last layer returns plain hidden states.
    """

    hidden_states: torch.Tensor
    router_state: torch.Tensor


class MoePreTrainedMixin:
    """Goes in front of the dense `PreTrainedModel` subclass."""

    # transformers decides by searching the model's source file for the decorator; our banks live elsewhere.
    _can_set_experts_implementation_cached_value = True
    # With the dot that follows, else `mlp.gate_proj` of dense layers would match too.
    _keep_in_fp32_modules_strict = {r"mlp\.gate(?=\.)"}
    #: Recorded by `capture_outputs`; a backbone adds its own layer and attention classes.
    ROUTER_RECORDS = {
        "router_logits": OutputRecorder(BaseRouter, index=0),
        "router_indices": OutputRecorder(BaseRouter, index=2),
        "router_penalties": OutputRecorder(BaseRouter, index=4),
    }
    #: `False` while somebody else (`hf_moe.trainers`) computes and adds the router losses: `forward` then leaves them.
    adds_router_losses = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (BaseRouter, LoadBalancer, StackedExperts, ZeroComputationExperts)):
            module.reset_parameters()

    def _grouped_mm_can_dispatch(self) -> bool:
        # transformers asks when it chooses the experts implementation, and takes "eager" where it was not asked for.
        config = self.config
        hidden_size = getattr(config, "expert_hidden_size", None) or config.hidden_size
        widths = {"hidden_size": hidden_size, "moe_intermediate_size": config.moe_intermediate_size}
        for name, width in widths.items():
            if width % 8:  # 16 bytes in half precision
                raise ValueError(
                    f'`experts_implementation="grouped_mm"` needs `{name}` to be a multiple of 8, got {width}. Use '
                    '"batched_mm" or "eager".'
                )
        return super()._grouped_mm_can_dispatch()

    def moe_blocks(self) -> list[tuple[str, MoeBlock]]:
        """Names and modules of the MoE blocks, in layer order."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, MoeBlock)]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, *args, **kwargs
    ) -> None:
        """As in transformers, but refuses reentrant checkpointing where it would silently drop gradients. The older
        `gradient_checkpointing_enable` ends here too.

        Raises:
            ValueError: `use_reentrant=True` while the model has router losses or a router state: recorded logits
                would have no graph.
        """
        config = self.config
        needs_graph = config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0 or config.has_router_penalty
        needs_graph = needs_graph or any(block.gate.carries_state for _, block in self.moe_blocks())
        if needs_graph and (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`activation_checkpointing_kwargs={'use_reentrant': True}` would drop the gradient of the router "
                "losses and router states. Use `{'use_reentrant': False}`, the default."
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, but the error of a damaged weight file names the file.

        Raises:
            ValueError: a weight file is truncated or corrupt.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            source = str(pretrained_model_name_or_path)
            folder = os.path.join(source, kwargs.get("subfolder") or "")
            if os.path.isdir(folder):
                from hf_moe.weights.folder import check_safetensors

                check_safetensors(folder)
            raise ValueError(
                f"A weight file of `{source}` is truncated or corrupt: {error}. Load it with `force_download=True`."
            ) from error

    def save_pretrained(self, save_directory, *args, code: str | None = "shim", **kwargs):
        """As in transformers; also writes the one-line shim through which the checkpoint loads with
        `trust_remote_code=True` where the plugin is installed but not imported.

        Args:
            code (`str`, *optional*, defaults to `"shim"`): `"shim"` or `None` for no code at all.
        """
        from hf_moe.hub import attach_shim

        attach_shim(self, save_directory, code=code, is_main_process=kwargs.get("is_main_process", True))
        return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """Pushes model, shim and, to a repository without one, a generated card; see [`~hf_moe.hub.push_to_hub`] for
        the keyword arguments."""
        from hf_moe.hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)


class MoeDecoderLayerMixin:
    """A pre-norm decoder layer whose `mlp` is a [`MoeBlock`] where the config says so. The attribute names are those
    of the Llama family; other layouts override `forward`."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_last = layer_idx == config.num_hidden_layers - 1
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor | RoutedHiddenStates,
        attention_mask: torch.Tensor | None = None,
        routing_context: RoutingContext | None = None,
        **kwargs,
    ) -> torch.Tensor | RoutedHiddenStates:
        """Attention and feed-forward, both residual; takes and returns `(B, S, D)`, with a router state if any."""
        hidden_states, router_state = self.unpack(hidden_states)
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states, router_state = self.feed_forward(hidden_states, routing_context, router_state)
        return self.pack(residual + hidden_states, router_state)

    def feed_forward(
        self, hidden_states: torch.Tensor, context: RoutingContext | None, router_state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`mlp`, sparse or dense. A dense layer hands the router state on unchanged."""
        if not isinstance(self.mlp, MoeBlock):
            return self.mlp(hidden_states), router_state
        context = (context or RoutingContext())._replace(prev_state=router_state)
        return self.mlp(hidden_states, context)

    def unpack(self, hidden_states: torch.Tensor | RoutedHiddenStates) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Splits what the previous layer returned."""
        return hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)

    def pack(
        self, hidden_states: torch.Tensor, router_state: torch.Tensor | None
    ) -> torch.Tensor | RoutedHiddenStates:
        """Joins what the next layer gets."""
        if self.is_last or router_state is None:
            return hidden_states
        return RoutedHiddenStates(hidden_states, router_state)


class MoeModelMixin:
    """Goes in front of the dense base model: swaps the layers in and tells routers what they may want to know."""

    #: The layer class of the backbone and the path of the list that holds the layers.
    moe_layer_class: type
    layers_attribute = "layers"

    def post_init(self) -> None:
        # `from_pretrained(folder, num_experts_per_tok=...)` sets fields after the config was checked.
        self.config.validate_architecture()
        # The dense `__init__` ends with `post_init`: the last moment before weights are initialised.
        layers: Any = self.get_submodule(self.layers_attribute)
        for index in range(len(layers)):
            layers[index] = self.moe_layer_class(self.config, index)
        if self.config.num_moe_layers:  # one of several towers may be dense
            self.load_balancer = LoadBalancer.from_config(self.config)
        super().post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeModelOutput:
        """The dense model's forward, with router logits and indices recorded where `output_router_logits`."""
        outputs = self.routed_forward(
            output_router_logits,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return MoeModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **self.routing_fields(outputs),
        )

    def routed_forward(self, output_router_logits: bool | None, **inputs) -> Any:
        """The dense model's output for `inputs`, its layers told what routers may want to know, with what they record.

        Args:
            output_router_logits (`bool`, *optional*): Record; `config.output_router_logits` by default.
            **inputs: Of the dense forward; and `routing_input_ids`, the ids that routers read in place of `input_ids`
                where only embeddings are passed.
        """
        routing_input_ids = inputs.pop("routing_input_ids", None)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        context = self.routing_context(
            inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("inputs_embeds"), routing_input_ids
        )
        return super().forward(
            output_router_logits=output_router_logits,
            output_router_indices=output_router_logits,
            output_router_penalties=output_router_logits,
            routing_context=context,
            **inputs,
        )

    def routing_fields(self, outputs: Any) -> dict[str, Any]:
        """The router fields of [`MoeModelOutput`] from what [`~MoeModelMixin.routed_forward`] returned."""
        router_logits = outputs.get("router_logits")
        if self.config.num_zero_computation_experts and router_logits:
            idle = self.config.num_zero_computation_experts
            router_logits = tuple(logits[:, :-idle] for logits in router_logits)
        return {
            "router_logits": router_logits,
            "router_indices": outputs.get("router_indices"),
            "all_router_logits": outputs.get("router_logits"),
            "router_penalties": outputs.get("router_penalties") or None,
        }

    def routing_context(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        routing_input_ids: torch.Tensor | None = None,
    ) -> RoutingContext:
        """What routers may want to know about this call. A 2-D mask covers cached positions too; the last S count."""
        batch, sequence = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        token_mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -sequence:].reshape(-1).bool()
        ids = input_ids if routing_input_ids is None else routing_input_ids
        flat_ids = None if ids is None else ids.reshape(-1)
        return RoutingContext(flat_ids, token_mask, batch, sequence)


class RouterLossesMixin:
    """Router losses of a head, computed once per forward from what the base model recorded."""

    @property
    def router_trunk(self) -> Any:
        """The stack of layers that the router losses are about."""
        return self.base_model

    def refuse_pooled_losses(self) -> None:
        """Where the layers differ in size, has stock TRL trainers say what their auxiliary loss cannot do."""
        if len(set(self.config.experts_per_layer)) > 1:
            self.register_forward_pre_hook(_refuse_pooled_loss, with_kwargs=True)

    def wants_routing(self, output_router_logits: bool | None) -> bool:
        """Whether the base model should record routing: on request, and in training whenever a router loss is on."""
        if output_router_logits or (output_router_logits is None and self.config.output_router_logits):
            return True
        if not (self.adds_router_losses and self.training and torch.is_grad_enabled()):
            return False
        has_loss = self.config.router_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0
        return has_loss or self.config.router_bias_update_speed > 0 or self.config.has_router_penalty

    def begin_balance(self, outputs: Any, *inputs: torch.Tensor | None) -> PendingBalance | None:
        """Counts what the routers chose and starts the sum over ranks, which then runs while the head does.

        Args:
            outputs ([`MoeModelOutput`] or `MoeEncoderOutput`): Of the base model.
            inputs: `input_ids, attention_mask, inputs_embeds` of this call, for the mask the routers saw.

        Returns:
            [`PendingBalance`], or `None` where nothing was recorded or the losses are somebody else's business.
        """
        if not outputs.all_router_logits or not self.adds_router_losses:
            return None
        recorded = (outputs.all_router_logits, outputs.router_indices, outputs.router_penalties)
        trunk = self.router_trunk
        return self.begin_balance_of(trunk, recorded, trunk.routing_context(*inputs).token_mask)

    def begin_balance_of(self, trunk: Any, recorded: tuple, token_mask: torch.Tensor | None) -> PendingBalance:
        """`begin_balance` for one stack of layers.

        Args:
            trunk: What has the layers, `moe_blocks` and a `load_balancer`.
            recorded (`tuple`): Its router logits, indices and penalties (or `None`), one of each per MoE layer.
            token_mask (`torch.Tensor` of shape `(T,)`, *optional*): The mask its routers saw.
        """
        routers = [block.gate for _, block in trunk.moe_blocks()]
        logits, indices, penalties = recorded
        rows = zip(routers, logits, indices, penalties or [None] * len(routers), strict=True)
        layers = [LayerRouting.from_router(*row) for row in rows]
        balancer = trunk.load_balancer
        balancer.z_loss = self.config.router_z_loss_coef > 0  # the config may have changed since the model was built
        return balancer.begin(layers, token_mask)

    def add_router_losses(
        self,
        loss: torch.Tensor | None,
        pending: PendingBalance | None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        labels_are_shifted: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Adds scale * (coefficient * value) of each router loss to `loss`.

        Args:
            loss (`torch.Tensor`, *optional*): Loss of the head; `None` stays `None`.
            pending ([`PendingBalance`], *optional*): From `begin_balance`.
            labels, num_items_in_batch, labels_are_shifted: They fix this micro-batch's share of the optimizer step;
                see [`PendingBalance.finish`].

        Returns:
            `loss` and the unweighted `aux_loss` (`None` where nothing was recorded).
        """
        if pending is None:
            return loss, None
        losses = pending.finish(labels, num_items_in_batch, labels_are_shifted)
        if loss is not None:
            total = losses.total(self.config.router_aux_loss_coef, self.config.router_z_loss_coef)
            loss = loss + total.to(loss.device)
        return loss, losses.aux_loss


class LanguageHeadMixin(RouterLossesMixin):
    """What the heads of language models have in common, whatever their base models read."""

    lm_head: nn.Module

    def language_output(
        self,
        outputs: Any,
        inputs: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        kwargs: dict[str, Any],
        output_class: type = MoeCausalLMOutput,
        **fields: Any,
    ) -> Any:
        """Logits, and where there are labels `loss` = cross-entropy + router losses.

        Args:
            outputs ([`MoeModelOutput`]): Of the base model.
            inputs (`tuple`): `input_ids, attention_mask, inputs_embeds` of this call.
            labels (`torch.Tensor` of shape `(B, S)`, *optional*): Next tokens; -100 where none counts.
            logits_to_keep (`int` or `torch.Tensor`): Positions to compute logits of; 0 for all.
            kwargs (`dict`): The call's further arguments, `shift_labels` and `num_items_in_batch` among them.
            output_class (`type`): Of the output.
            **fields: Further fields of the output.
        """
        pending = self.begin_balance(outputs, *inputs)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        shifted = kwargs.get("shift_labels") is not None
        counted = kwargs["shift_labels"] if shifted else labels
        loss, aux_loss = self.add_router_losses(loss, pending, counted, kwargs.get("num_items_in_batch"), shifted)
        return output_class(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.all_router_logits,
            router_indices=outputs.router_indices,
            **fields,
        )


class MoeForCausalLMMixin(LanguageHeadMixin):
    """A language model: the backbone's base model and a linear head."""

    #: The MoE base model class of the backbone.
    base_class: type
    #: Whether its linear head has a bias.
    lm_head_bias = False

    def __init__(self, config: Any):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.base_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=self.lm_head_bias)
        self.refuse_pooled_losses()
        self.post_init()

    def generate(self, *args, **kwargs):
        """As in transformers, but not with routers that choose among all tokens of a batch.

        Raises:
            ValueError: such a router; the message says what to do.
        """
        for _, block in self.moe_blocks():
            if getattr(block.gate, "non_causal", False):
                raise ValueError(
                    f"`generate` cannot work with `router_type={self.config.router_type!r}`, which routes a token by "
                    "the tokens after it, too. Set `router_config={'fallback': 'topk'}` and call `model.eval()`, or "
                    "use another router."
                )
        return super().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutput:
        """Next-token logits; `loss` = cross-entropy + router losses where `labels` are given.

        Args:
            output_router_logits (`bool`, *optional*): Return `router_logits`, `router_indices` and `aux_loss`.
                In training they are recorded, and the losses applied, whatever this says.
        """
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=self.wants_routing(output_router_logits),
            **kwargs,
        )
        inputs = (input_ids, attention_mask, inputs_embeds)
        return self.language_output(outputs, inputs, labels, logits_to_keep, kwargs)


def _refuse_pooled_loss(model: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
    """TRL puts a forward of its own in place of the model's and asks for it with `fused_lm_head`. Its auxiliary loss
    pools the layers, so they would have to be of one size; the error it ends in names neither cause nor way out."""
    wanted = kwargs.get("output_router_logits", model.config.output_router_logits)
    if wanted and kwargs.get("fused_lm_head"):
        raise ValueError(
            f"`num_experts` is {model.config.num_experts}, but the auxiliary loss of a stock TRL trainer needs the "
            "same number in every layer. Use `MoeSFTTrainer` or `MoeDPOTrainer` of `hf_moe.trainers`, or set "
            "`router_aux_loss_coef=0.0`."
        )


class _ClassifierMixin(RouterLossesMixin):
    # Classification losses are means over the micro-batch, so Trainer has to divide them by the accumulation steps.
    accepts_loss_kwargs = False

    def encode(self, input_ids, attention_mask, inputs_embeds, output_router_logits, kwargs) -> MoeModelOutput:
        return self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_router_logits=self.wants_routing(output_router_logits),
            **kwargs,
        )


class MoeForSequenceClassificationMixin(_ClassifierMixin):
    """Goes in front of `GenericForSequenceClassification`: the same head, with router losses and outputs."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeSequenceClassifierOutput:
        """Logits `(B, num_labels)` read at the last token that is not padding.

        Raises:
            ValueError: several sequences and no `pad_token_id`: their ends cannot be told.
        """
        cache = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        outputs = self.encode(input_ids, attention_mask, inputs_embeds, output_router_logits, {**cache, **kwargs})
        logits = self.score(outputs.last_hidden_state)  # (B, S, num_labels)
        last = self.last_token(input_ids, attention_mask, logits)
        pooled = logits[torch.arange(logits.shape[0], device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config)
        pending = self.begin_balance(outputs, input_ids, attention_mask, inputs_embeds)
        loss, aux_loss = self.add_router_losses(loss, pending)
        return MoeSequenceClassifierOutput(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.all_router_logits,
            router_indices=outputs.router_indices,
        )

    def last_token(self, input_ids, attention_mask, logits: torch.Tensor) -> torch.Tensor | int:
        """Position of the last real token of each sequence, `(B,)`, for left and right padding."""
        pad = self.config.pad_token_id
        if pad is None and logits.shape[0] != 1:
            raise ValueError(
                "`config.pad_token_id` is None, so the ends of several sequences cannot be told apart. Set it, or use "
                "batches of one."
            )
        if pad is None or input_ids is None:
            return -1
        positions = torch.arange(input_ids.shape[-1], device=logits.device, dtype=torch.int32)
        return (positions * (input_ids != pad).to(logits.device, torch.int32)).argmax(-1)


class MoeForTokenClassificationMixin(_ClassifierMixin):
    """Goes in front of `GenericForTokenClassification`: the same head, with router losses and outputs."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeTokenClassifierOutput:
        """Logits `(B, S, num_labels)`."""
        cache = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        outputs = self.encode(input_ids, attention_mask, inputs_embeds, output_router_logits, {**cache, **kwargs})
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = self.loss_function(logits, labels, self.config) if labels is not None else None
        pending = self.begin_balance(outputs, input_ids, attention_mask, inputs_embeds)
        loss, aux_loss = self.add_router_losses(loss, pending)
        return MoeTokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.all_router_logits,
            router_indices=outputs.router_indices,
        )
