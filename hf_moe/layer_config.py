"""One layer's view of a model config whose MoE layers differ."""

from typing import Any


__all__ = ["LayerConfig", "layer_config"]


class LayerConfig:
    """Reads through to a model config, except for what this layer has otherwise.

    Nothing is copied: what is set on the model's config later, such as the experts implementation, is seen here too.

    Args:
        config: The model config, or another such view of it.
        **own: Fields of this layer.

    Example:

    ```python
    >>> LayerConfig(MoeLlamaConfig(num_experts=8), num_experts=4).num_experts
    4
    ```
    """

    def __init__(self, config: Any, **own: Any):
        self._config = config
        self._own = own

    def __getattr__(self, name: str) -> Any:
        # Asked of an instance that is being unpickled or copied, these two would look for themselves for ever.
        if name in ("_config", "_own"):
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._config, name)


def layer_config(config: Any, layer_idx: int) -> Any:
    """The config as the block of layer `layer_idx` reads it: there, the numbers of experts are its own.

    Args:
        config: A model config with the fields of `MoeConfigMixin`.
        layer_idx (`int`): One of `config.moe_layer_indices`.

    Returns:
        `config` itself where `num_experts` is one number for all layers, else a [`LayerConfig`]. In both,
        `num_experts` and `num_routing_targets` are `int`; the view also knows `previous_num_routing_targets`, those
        of the MoE layer before (its own for the first).
    """
    counts = getattr(config, "num_experts", None)
    if not isinstance(counts, (list, tuple)):
        return config
    position = config.moe_layer_indices.index(layer_idx)
    own, previous = counts[position], counts[max(position - 1, 0)]
    others = config.num_zero_computation_experts
    return LayerConfig(
        config,
        num_experts=own,
        num_local_experts=own,
        num_routing_targets=own + others,
        previous_num_routing_targets=previous + others,
    )
