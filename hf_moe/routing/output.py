"""What a router says and what it is told.

Shapes: B batch, S sequence, T = B * S tokens, D hidden, N experts (all, zero-computation ones included), K per token.
"""

from typing import NamedTuple

import torch


__all__ = ["RouterOutput", "RoutingContext"]


class RouterOutput(NamedTuple):
    """One routing decision. A tuple, so that transformers' `OutputRecorder(BaseRouter, index=0)` can record it.

    An *empty slot* has `top_k_index == num_experts` and weight exactly 0. Active slots come first, heaviest first;
    a token whose slots are all empty gets output 0.

    Args:
        router_logits (`torch.Tensor` of shape `(T, N)`): Scores before softmax or sigmoid, float32.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Mixing weights in the dtype of the hidden states.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Chosen experts, int64.
        state (`torch.Tensor` of shape `(T, ...)`, *optional*): Handed to the router of the next MoE layer.
        penalty (`torch.Tensor` of shape `(T,)`, *optional*): In training, what the router itself adds to the loss for
            each token, its coefficient included; the loss takes the mean over tokens and layers.
    """

    router_logits: torch.Tensor
    top_k_weights: torch.Tensor
    top_k_index: torch.Tensor
    state: torch.Tensor | None = None
    penalty: torch.Tensor | None = None


class RoutingContext(NamedTuple):
    """What a router may want to know besides the hidden states. Routers ignore what they do not need.

    Args:
        input_ids (`torch.Tensor` of shape `(T,)`, *optional*): Token ids; absent when the model got `inputs_embeds`.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): Boolean, `False` on padding.
        batch_size (`int`, *optional*): B.
        sequence_length (`int`, *optional*): S, of this call (1 while decoding with a cache).
        prev_state (`torch.Tensor` of shape `(T, ...)`, *optional*): `RouterOutput.state` of the previous MoE layer.
    """

    input_ids: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    prev_state: torch.Tensor | None = None
