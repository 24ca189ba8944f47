"""The router: a small causal transformer over token ids, computed before the first layer of the backbone.

Shapes: B batch, S sequence, L cached and new positions, H router width, N experts.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from hf_moe.layer_config import LayerConfig


__all__ = ["ReadMeRouter"]


class _Attention(nn.Module):
    """Causal self-attention with biases. Its matrices have names of their own, so that adapters aimed at the
    backbone's attention do not land here, where the language-model loss gives no gradient."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.router_hidden_size // config.router_num_heads
        self.query_key_value = nn.Linear(config.router_hidden_size, 3 * config.router_hidden_size)
        self.output = nn.Linear(config.router_hidden_size, config.router_hidden_size)

    def forward(self, states: torch.Tensor, mask: Any, positions: tuple, cache: Cache | None) -> torch.Tensor:
        shape = (*states.shape[:-1], -1, self.head_dim)
        query, key, value = (x.view(shape).transpose(1, 2) for x in self.query_key_value(states).chunk(3, dim=-1))
        query, key = apply_rotary_pos_emb(query, key, *positions)  # (B, heads, S, H / heads)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # (B, heads, L, H / heads)
        # Note: the released code divides scores by 1; sqrt(d_head) here, as everywhere else.
        output, _ = sdpa_attention_forward(self, query, key, value, mask, scaling=self.head_dim**-0.5)
        return self.output(output.reshape(states.shape))


class _Block(nn.Module):
    """Attention and two linear maps with SiLU between, both residual and normed before."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        width = config.router_hidden_size
        self.attention_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.attention = _Attention(config, layer_idx)
        self.mlp_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: torch.Tensor, mask: Any, positions: tuple, cache: Cache | None) -> torch.Tensor:
        states = states + self.attention(self.attention_norm(states), mask, positions, cache)
        return states + self.down(F.silu(self.up(self.mlp_norm(states))))


class ReadMeRouter(nn.Module):
    """G of Read-ME (2410.19123, Sec. 3): G(x_1..t) scores the experts of token t in every layer.

    It sees nothing but token ids, so that it runs ahead of the backbone. Its attention is always computed by
    `scaled_dot_product_attention`, in the dtype of its own weights: the decision does not depend on the backbone's
    attention implementation.

    Args:
        config ([`ReadMeConfig`]): With `router_hidden_size` H, `router_num_heads`, `router_layers`, `num_experts` N.

    Example:
        ```python
        model.model.router(input_ids).argmax(-1)  # (B, S): the expert of each token
        ```
    """

    def __init__(self, config: Any):
        super().__init__()
        head_dim = config.router_hidden_size // config.router_num_heads
        self.config: Any = LayerConfig(
            config, hidden_size=config.router_hidden_size, head_dim=head_dim, _attn_implementation="sdpa"
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.router_hidden_size)
        first = config.num_hidden_layers  # behind the backbone's layers in the cache
        self.blocks = nn.ModuleList([_Block(config, first + i) for i in range(config.router_layers)])
        self.norm = LlamaRMSNorm(config.router_hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.router_hidden_size, config.num_experts)
        self.rotary_emb = LlamaRotaryEmbedding(self.config)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Scores every token's experts.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): Token ids of this call.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 on padding; or a mask `(B, 1, S, L)`.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): Counted on from the cache by default.
            past_key_values (`Cache`, *optional*): From [`extend_cache`]; grows by S tokens.

        Returns:
            `torch.Tensor` of shape `(B, S, N)`, float32.
        """
        with torch.autocast(device_type=input_ids.device.type, enabled=False):
            states = self.embed_tokens(input_ids)  # (B, S, H)
            if position_ids is None:
                # Of the decoder's first layer, which is asked before it is updated, as by the decoder itself.
                seen = 0 if past_key_values is None else past_key_values.get_seq_length()
                position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + seen).unsqueeze(0)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            if isinstance(mask, torch.Tensor) and mask.is_floating_point():
                mask = mask.to(states.dtype)
            positions = self.rotary_emb(states, position_ids)
            for block in self.blocks:
                states = block(states, mask, positions, past_key_values)
            return self.head(self.norm(states)).float()
