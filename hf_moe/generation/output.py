"""What self-contrast decoding returns with `return_dict_in_generate=True`."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput


__all__ = ["SelfContrastOutput", "cache_bytes"]


@dataclass
class SelfContrastOutput(GenerateDecoderOnlyOutput):
    """Output of [`~hf_moe.SelfContrast`]; logits, attentions, hidden states and cache are those of the strong stream.

    Args:
        sequences (`torch.LongTensor` of shape `(B, S)`): Prompt and generated tokens.
        scores (`tuple` of `torch.Tensor` of shape `(B, V)`, *optional*): Contrasted logits after the processors, per
            step, with `output_scores=True`.
        logits (`tuple` of `torch.Tensor` of shape `(B, V)`, *optional*): Strong logits, with `output_logits=True`.
        weak_logits (`tuple` of `torch.Tensor` of shape `(B, V)`, *optional*): Weak logits, with `output_logits=True`.
        weak_cache_bytes (`int`, *optional*): Memory of the weak stream's cache at the end; `None` without cache.

    Example:
        ```python
        output = model.generate(**inputs, custom_generate=SelfContrast(), return_dict_in_generate=True)
        output.weak_cache_bytes
        ```
    """

    weak_logits: tuple[torch.Tensor, ...] | None = None
    weak_cache_bytes: int | None = None


def cache_bytes(cache: Cache | None) -> int | None:
    """Memory that a cache's tensors take.

    Args:
        cache ([`~transformers.Cache`], *optional*): Any cache made of layers.

    Returns:
        `int`, or `None` where there is no cache or one that does not show its layers.

    Example:
        ```python
        cache_bytes(model(**inputs).past_key_values)
        ```
    """
    if cache is None or not hasattr(cache, "layers"):
        return None
    return sum(_bytes(value) for layer in cache.layers for value in vars(layer).values())


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
