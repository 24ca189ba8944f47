"""The strong and the weak stream, as two forward passes per token. Shapes: B batch, S sequence, V vocabulary."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers.generation.utils import ALL_CACHE_NAMES

from .output import cache_bytes


__all__ = ["SeparateStreams", "find_cache", "prepare_cache", "without_cache"]


class SeparateStreams:
    """Two streams with a cache each. Works for every model and every cache, also one that the user brings.

    Args:
        model ([`~transformers.PreTrainedModel`]): As `generate` hands it to a `custom_generate` callable.
        generation_config ([`~transformers.GenerationConfig`]): Prepared by `generate`.
        model_kwargs (`dict`): Prepared by `generate`; the strong stream goes on with them.
        input_ids (`torch.LongTensor` of shape `(B, S)`): The prompt.
        weak (`Callable`): Makes the context in which the model routes weakly.
    """

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        input_ids: torch.Tensor,
        weak: Callable[[], AbstractContextManager],
    ):
        self.model, self.generation_config, self.weak = model, generation_config, weak
        self.strong_kwargs = model_kwargs
        self.weak_kwargs = without_cache(model_kwargs)
        position_ids = self.weak_kwargs.get("position_ids")
        # a user who continues a cache may have given the positions of the new tokens alone; the weak stream needs all
        if position_ids is not None and 0 < input_ids.shape[1] != position_ids.shape[-1]:
            self.weak_kwargs["position_ids"] = model._prepare_position_ids_for_generation(input_ids, self.weak_kwargs)
        prepare_cache(model, generation_config, self.weak_kwargs, input_ids)

    def prefill(self, input_ids: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Run the prompt; returns the strong outputs and both logits, `(B, V)` each."""
        strong = self.model._prefill(input_ids, self.generation_config, self.strong_kwargs)
        with self.weak():
            weak = self.model._prefill(input_ids, self.generation_config, self.weak_kwargs)
        return self._advance(strong, weak)

    def step(self, input_ids: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Run the newest token; returns as [`SeparateStreams.prefill`]."""
        strong = self._forward(input_ids, self.strong_kwargs)
        with self.weak():
            weak = self._forward(input_ids, self.weak_kwargs)
        return self._advance(strong, weak)

    def _forward(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        length = 1 if kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **kwargs)
        return self.model(**inputs, return_dict=True)

    def _advance(self, strong: Any, weak: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        self.strong_kwargs = self.model._update_model_kwargs_for_generation(strong, self.strong_kwargs)
        self.weak_kwargs = self.model._update_model_kwargs_for_generation(weak, self.weak_kwargs)
        return strong, strong.logits[:, -1], weak.logits[:, -1]

    def weak_cache_bytes(self) -> int | None:
        """Memory of the second cache."""
        return cache_bytes(find_cache(self.weak_kwargs))

    def strong_cache(self) -> Any:
        """The cache to return."""
        return find_cache(self.strong_kwargs)


def find_cache(model_kwargs: Any) -> Any:
    """The cache among a model's keyword arguments, or `None`."""
    return next((model_kwargs[name] for name in ALL_CACHE_NAMES if model_kwargs.get(name) is not None), None)


def without_cache(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A copy of `model_kwargs` that shares no tensor with it and has no cache."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in model_kwargs.items()
        if name not in ALL_CACHE_NAMES
    }


def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], input_ids: torch.Tensor) -> None:
    """Give `model_kwargs` a new cache of the kind that `generate` would make, with a row per row of `input_ids`."""
    length = generation_config.max_length - 1
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != input_ids.shape[1]:
        length += embeds.shape[1]
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    mode = generation_config.get_generation_mode()
    model._prepare_cache_for_generation(generation_config, model_kwargs, mode, input_ids.shape[0] // copies, length)
