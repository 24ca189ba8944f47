"""Running a model over batches of tokens and handing on what its routers decided, a batch at a time.

Shapes: B batch, S sequence, T = B * S tokens, N experts, K per token.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_moe.routing.layer_routing import LayerRouting
from hf_moe.views import RoutingRecorder, record_routing, unwrap_model


__all__ = ["RoutedBatch", "longest_window", "route"]

DEFAULT_MAX_LENGTH = 512
MODEL_INPUTS = ("input_ids", "attention_mask")


class RoutedBatch(NamedTuple):
    """One batch and its routing, on the CPU.

    Args:
        token_ids (`torch.Tensor` of shape `(T,)`): The batch, flattened.
        token_mask (`torch.Tensor` of shape `(T,)`): `False` on padding.
        positions (`torch.Tensor` of shape `(T,)`): Place of each token in its window, from 0.
        layers (`list[LayerRouting]`): One per MoE layer.
    """

    token_ids: torch.Tensor
    token_mask: torch.Tensor
    positions: torch.Tensor
    layers: list[LayerRouting]


def longest_window(config: Any) -> int:
    """Tokens of a window where the user has not said: 512, or what the model can hold.

    Args:
        config (`PreTrainedConfig`): Of the model.

    Returns:
        `int`
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(DEFAULT_MAX_LENGTH, longest or DEFAULT_MAX_LENGTH)


@torch.no_grad()
def route(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor] | Mapping[str, torch.Tensor]],
    take: Callable[[RoutedBatch], None],
) -> None:
    """Routes batches without computing logits over the vocabulary. The model runs in eval mode, and returns to the
    mode it was in on every exit.

    Args:
        model (`nn.Module`): Accepted by [`hf_moe.moe_layers`], bare or wrapped.
        batches (`Iterable`): `input_ids` and `attention_mask`, both `(B, S)`; or mappings with these and further
            inputs of the model, such as images.
        take (`Callable`): Called with a [`RoutedBatch`] for each.

    Raises:
        ValueError: no MoE layer, an unknown family, or a router that is not called once per token.
    """
    inner: Any = unwrap_model(model)
    if getattr(inner.config, "is_encoder_decoder", False) and hasattr(inner, "decoder") and hasattr(inner, "encoder"):
        raise ValueError(
            f"{type(inner).__name__} routes sources and targets, and a text is only one of them. Pass "
            "`model.get_encoder()` for the routing of its encoder."
        )
    trunk = inner.base_model  # without the head, whose logits nobody looks at
    device = inner.get_input_embeddings().weight.device
    training = inner.training
    inner.eval()
    try:
        with record_routing(inner, offload=True) as recorder:
            for batch in batches:
                inputs = dict(batch if isinstance(batch, Mapping) else zip(MODEL_INPUTS, batch, strict=True))
                input_ids, attention_mask = (inputs[name] for name in MODEL_INPUTS)
                trunk(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
                positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
                layers = _layers(recorder, input_ids.numel())
                recorder.clear()
                mask = attention_mask.flatten().bool()
                take(RoutedBatch(input_ids.flatten(), mask, positions.flatten(), layers))
    finally:
        inner.train(training)


def _layers(recorder: RoutingRecorder, tokens: int) -> list[LayerRouting]:
    layers = []
    for record in recorder.layers:
        routed = [index.shape[0] for index in record.top_k_index]
        if routed != [tokens]:
            raise ValueError(
                f"The router of {record.view.name!r} was called with {routed} tokens for a batch of {tokens}. "
                "Reports need models that route every token exactly once per layer."
            )
        layers.append(LayerRouting(record.router_logits[0], record.top_k_index[0], record.view.probabilities))
    return layers
