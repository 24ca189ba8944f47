"""A language model of two MoE layers that uses nothing of `hf_moe` but its routers and its load balancer."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_moe.routing import BaseRouter, LayerRouting, LoadBalancer, RoutingContext, build_router


class ToyMoeConfig(PreTrainedConfig):
    model_type = "toy_balanced_moe"

    def __init__(self, num_experts=4, balance_mode="micro", coefficient=0.1, router_config=None, **kwargs):
        self.num_experts = self.num_routing_targets = num_experts
        self.num_experts_per_tok = 2
        self.hidden_size = 16
        self.vocab_size = 32
        self.moe_layer_indices = [0, 1]
        self.initializer_range = 0.3
        self.expert_capacity_factor = None
        self.router_type = kwargs.pop("router_type", "softmax_topk")
        self.router_config = router_config or {}
        self.balance_mode = balance_mode
        self.balance_local_fraction = 0.0
        self.router_z_loss_coef = kwargs.pop("router_z_loss_coef", 0.0)
        self.router_bias_update_speed = kwargs.pop("router_bias_update_speed", 0.0)
        self.coefficient = coefficient
        super().__init__(**kwargs)


class ToyLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.gate = build_router(config, layer_idx)
        self.experts = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.hidden_size))

    def forward(self, hidden_states, token_mask):  # (T, D), (T,)
        out = self.gate(hidden_states, RoutingContext(token_mask=token_mask))
        dense = torch.zeros(hidden_states.shape[0], self.experts.shape[0] + 1, dtype=hidden_states.dtype)
        dense = dense.scatter(-1, out.top_k_index, out.top_k_weights)[:, :-1]  # (T, N)
        mixed = torch.einsum("tn,ndf,td->tf", dense, self.experts, hidden_states)
        return hidden_states + torch.tanh(mixed), out.router_logits, out.top_k_index


class ToyMoeForCausalLM(PreTrainedModel):
    config_class = ToyMoeConfig
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config, i) for i in range(2))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.load_balancer = LoadBalancer.from_config(config)
        self.loss_type = "ForCausalLM"
        self.checkpointing = False
        self.in_tree_scale = False  # what transformers' models do: no scale at all
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ToyLayer):
            nn.init.normal_(module.experts, std=0.3)
        if isinstance(module, BaseRouter | LoadBalancer):
            module.reset_parameters()

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        token_mask = None if attention_mask is None else attention_mask.reshape(-1).bool()
        hidden_states = self.embed(input_ids).flatten(0, 1)
        recorded = []
        for layer in self.layers:
            if self.checkpointing:
                hidden_states, logits, index = checkpoint(layer, hidden_states, token_mask, use_reentrant=False)
            else:
                hidden_states, logits, index = layer(hidden_states, token_mask)
            recorded.append(LayerRouting.from_router(layer.gate, logits, index))
        pending = self.load_balancer.begin(recorded, token_mask)
        logits = self.lm_head(hidden_states).unflatten(0, input_ids.shape)
        losses = pending.finish(labels, num_items_in_batch)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
            coefficient = self.config.coefficient
            extra = coefficient * losses.aux_loss if self.in_tree_scale else None
            loss = loss + (losses.total(coefficient, self.config.router_z_loss_coef) if extra is None else extra)
        self.last_losses = losses
        return CausalLMOutput(loss=loss, logits=logits)


def toy_model(seed: int = 0, **config) -> ToyMoeForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyMoeForCausalLM(ToyMoeConfig(**config))


def toy_dataset(num_rows: int, length: int = 8, seed: int = 0, pad: bool = False) -> list[dict]:
    """Rows of one domain each (a quarter of the vocabulary), sorted by domain; `pad` gives unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_rows):
        domain = 8 * (4 * row // num_rows)
        ids = torch.randint(domain, domain + 8, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.int64)
        if pad:
            mask[int(torch.randint(2, length + 1, (1,), generator=generator)) :] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def random_routing(generator, num_tokens=16, num_experts=4, top_k=2, skew=0.0) -> LayerRouting:
    """A layer's routing from random logits that need a gradient; `skew` favours the first experts."""
    logits = torch.randn(num_tokens, num_experts, generator=generator) - skew * torch.arange(num_experts)
    logits = logits.requires_grad_()
    return LayerRouting(logits, logits.topk(top_k, dim=-1).indices)


class SimulatedRanks:
    """Load balancers of W ranks in one process: the real code, with the sum over ranks done here."""

    def __init__(self, world_size, *args, **kwargs):
        self.payloads: list[torch.Tensor] = []
        self.num_collectives = 0
        ranks = self

        class Rank(LoadBalancer):
            @property
            def world_size(self):
                return world_size

            def _all_reduce(self, payload):
                originals = ranks.payloads
                originals.append(payload.clone())
                if len(originals) == world_size:
                    ranks.payloads = []
                    ranks.num_collectives += 1
                return SimpleNamespace(wait=lambda: payload.copy_(torch.stack(originals).sum(0)))

        self.balancers = [Rank(*args, **kwargs) for _ in range(world_size)]

    def begin_step(self, *args, **kwargs):
        for balancer in self.balancers:
            balancer.begin_step(*args, **kwargs)

    def __call__(self, layers_per_rank, **kwargs):
        pending = [b.begin(layers) for b, layers in zip(self.balancers, layers_per_rank, strict=True)]
        return [p.finish(**kwargs) for p in pending]

    def end_step(self):
        for balancer in self.balancers:
            balancer.start_reduction()
        return [balancer.end_step() for balancer in self.balancers]
