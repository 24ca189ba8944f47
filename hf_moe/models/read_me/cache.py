"""The router's keys and values, kept behind those of the decoder layers."""

from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


__all__ = ["extend_cache"]


def extend_cache(cache: Cache, config: Any) -> Cache:
    """Appends the router's layers to a cache that was made for the decoder layers alone; does nothing the second time.

    Cropping, reordering by beams and repeating for several sequences then include the router.

    Args:
        cache (`Cache`): Dynamic, quantized or static; static caches gain static layers of the same length.
        config ([`ReadMeConfig`]): The model's.

    Returns:
        `Cache`: The same object.

    Raises:
        ValueError: the decoder layers hold tokens that the router's layers do not.
    """
    first, layers = config.num_hidden_layers, cache.layers
    if cache.layer_class_to_replicate is None:  # caches without a config grow by themselves
        while len(layers) < first + config.router_layers:
            layers.append(
                StaticLayer(layers[0].max_cache_len) if isinstance(layers[0], StaticLayer) else DynamicLayer()
            )
    if not layers or not isinstance(layers[0], StaticLayer):  # static ones would have to ask their device
        tokens, routed = cache.get_seq_length(0), cache.get_seq_length(first)
        if tokens != routed:
            raise ValueError(
                f"`past_key_values` holds {tokens} tokens of the decoder but {routed} of the router: it was filled by "
                "another model. Begin with an empty cache."
            )
    return cache
