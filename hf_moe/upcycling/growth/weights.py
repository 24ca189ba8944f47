"""The weights of the larger model, one parameter after the other."""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import Axes, axes_of, is_input_first, layer_of
from .prediction import Growth
from .sizes import Sizes
from .width import Widener


__all__ = ["grown_weights"]


@torch.no_grad()
def grown_weights(
    model: PreTrainedModel, skeleton: nn.Module, growth: Growth, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Every parameter of the large model, in the dtype of the small one's; products are formed in float32.

    Args:
        model (`PreTrainedModel`): The small model.
        skeleton (`nn.Module`): The large one, without weights.
        growth ([`Growth`]): What was decided.
        generator (`torch.Generator`): The only source of randomness.

    Returns:
        `dict[str, torch.Tensor]`: New tensors on the CPU, by name; tied weights once.

    Raises:
        ValueError: a weight the family's table does not have, or one that is not in memory.
    """
    source = dict(model.named_parameters())
    widener = Widener(growth.maps, growth.width, growth.noise_std, generator)
    # Where the head's matrix is the embedding, its columns cannot be divided: the norm in front of it is.
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    shares = widener.head_shares() if tied and not growth.maps["hidden"].is_identity else None
    if shares is not None and not any(axes_of(model.config.model_type, name).is_final_norm for name in source):
        raise ValueError(
            f"{type(model).__name__} ties its head to its embeddings and has no weight in its last norm, so "
            "`hidden_size` cannot grow. Set `tie_word_embeddings=False` in its config first."
        )
    grown = {}
    for name, _ in skeleton.named_parameters():
        layer = layer_of(name)
        axes = axes_of(model.config.model_type, name)
        origin = name if layer is None else _in_layer(name, layer, growth.layers[layer])
        read = partial(_read, source, axes=axes, growth=growth)
        following = None
        if layer is not None and growth.width == "aki":
            next_layer = min(growth.layers[layer] + 1, growth.old.num_hidden_layers - 1)
            following = read(_in_layer(name, layer, next_layer))
        weight = read(origin)
        if weight.ndim == 2:
            flipped = is_input_first(model, origin)
            other = None if following is None else _oriented(following, flipped)
            value = _oriented(widener.matrix(_oriented(weight, flipped), axes, other), flipped)
        else:
            is_bias = name.endswith(".bias") and axes.inputs is not None
            value = widener.vector(weight, axes, following if is_bias else None)
        if axes.is_final_norm and shares is not None:
            value = value * shares
        if layer in growth.inserted and axes.inputs is not None and axes.outputs == "hidden":
            value = torch.zeros_like(value)
        # Never the small model's own memory.
        grown[name] = value.to(source[origin].dtype, copy=True).contiguous()
    return grown


def _oriented(matrix: torch.Tensor, flipped: bool) -> torch.Tensor:
    """`(outputs, inputs)` of a matrix stored the other way, and back."""
    return matrix.t() if flipped else matrix


def _read(source: dict[str, nn.Parameter], name: str, axes: Axes, growth: Growth) -> torch.Tensor:
    parameter = source[name]
    if parameter.device.type == "meta":
        raise ValueError(f"`{name}` is not in memory (offloaded, or on the meta device); load the model whole.")
    tensor = parameter.detach().to("cpu", torch.float32)
    return tensor if growth.pooled_kv_heads is None else _pool(tensor, axes, growth.old, growth.pooled_kv_heads)


def _pool(tensor: torch.Tensor, axes: Axes, old: Sizes, kv_heads: int) -> torch.Tensor:
    """Key-value heads averaged in groups, as grouped-query models are made from others (2305.13245, Sec. 2.1)."""

    def mean(rows: torch.Tensor) -> torch.Tensor:
        grouped = rows.unflatten(0, (kv_heads, old.num_key_value_heads // kv_heads, old.head_dim))
        return grouped.mean(dim=1).flatten(0, 1)

    if axes.outputs == "kv":
        return mean(tensor)
    if axes.outputs == "qkv":
        queries, keys = old.num_attention_heads * old.head_dim, old.num_key_value_heads * old.head_dim
        query, key, value = tensor.split([queries, keys, keys])
        return torch.cat([query, mean(key), mean(value)])
    return tensor


def _in_layer(name: str, layer: int, other: int) -> str:
    """The same parameter in another layer."""
    return ".".join(str(other) if part == str(layer) else part for part in name.split("."))
