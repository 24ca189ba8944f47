"""Shallower models: the students of Mixture-of-Students."""

import copy
from typing import Any

import torch

from .configuration import MoeConfigMixin


__all__ = ["drop_layers"]


def drop_layers(config_or_model: Any, every: int = 8) -> Any:
    """The same model without every `every`-th layer, all else unchanged: 24 layers become 21.

    The student of [Mixture-of-Students](https://huggingface.co/papers/2201.05596), Sec. 4.2. Where `moe_layers` is a
    rule (`"every:2"`), it stays: MoE layers are where the rule puts them in the shorter model, and of a list of expert
    counts the first entries go: ten times N and two times 2N become eight times N and two times 2N, as in the paper.
    Where it is a list of layers, layers `every - 1, 2 * every - 1, ...` go with what they hold.

    The student of the paper starts with random weights, `PrMoeForCausalLM(drop_layers(config))`. Given a model, its
    layers are taken as listed whatever the rule: `moe_layers` becomes a list, and all that stays keeps its weights.

    Args:
        config_or_model (`PreTrainedConfig` or `PreTrainedModel`): Of one of the backbones of this package; unchanged.
        every (`int`, defaults to 8): At least 2, at most the number of layers.

    Returns:
        A config, or a model with weights copied from the given one.

    Raises:
        ValueError: `every` is out of range.
        TypeError: not a config or model with the fields of `MoeConfigMixin`.

    Example:

    ```python
    >>> from hf_moe import PrMoeConfig, drop_layers
    >>> student = drop_layers(PrMoeConfig())
    >>> student.num_hidden_layers, student.num_experts
    (21, [32, 32, 32, 32, 32, 32, 32, 32, 64, 64])
    ```
    """
    config: Any = getattr(config_or_model, "config", config_or_model)
    if not isinstance(config, MoeConfigMixin):
        raise TypeError(
            f"`config_or_model` must be a config or a model of this package's backbones, got "
            f"{type(config_or_model).__name__}."
        )
    layers = config.num_hidden_layers
    if isinstance(every, bool) or not isinstance(every, int) or not 2 <= every <= layers:
        raise ValueError(f"`every` must be between 2 and the number of layers ({layers}), got {every!r}.")
    if config_or_model is config:
        return _shallower(config, every)[0]
    listed = copy.deepcopy(config)
    listed.moe_layers = config.moe_layer_indices
    return _with_weights(config_or_model, *_shallower(listed, every))


def _shallower(config: Any, every: int) -> tuple[Any, list[int]]:
    """The student's config, and for each of its layers the one it comes from."""
    layers, moe = config.num_hidden_layers, config.moe_layer_indices
    changes: dict[str, Any] = {"num_hidden_layers": layers - layers // every}
    origin = [layer for layer in range(layers) if (layer + 1) % every]
    counts = config.experts_per_layer
    if isinstance(config.moe_layers, str):
        shorter = copy.deepcopy(config)
        shorter.num_hidden_layers = len(origin)
        counts = counts[len(moe) - shorter.num_moe_layers :]
    else:
        counts = [count for layer, count in zip(moe, counts, strict=True) if layer in origin]
        changes["moe_layers"] = [place for place, layer in enumerate(origin) if layer in moe]
    if not isinstance(config.num_experts, int):
        changes["num_experts"] = counts
    if getattr(config, "layer_types", None):
        changes["layer_types"] = [config.layer_types[layer] for layer in origin]
    fields = config.to_dict()
    for name, value in changes.items():
        fields[config.attribute_map.get(name, name)] = value
    return type(config).from_dict(fields), origin


@torch.no_grad()
def _with_weights(model: Any, config: Any, origin: list[int]) -> Any:
    student = type(model)(config).to(dtype=model.dtype, device=model.device).train(model.training)
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    prefix += f"{base.layers_attribute}."
    weights = model.state_dict()
    for name, tensor in student.state_dict().items():
        source = name
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            source = f"{prefix}{origin[int(layer)]}.{rest}"
        tensor.copy_(weights[source])
    return student
