"""Both streams as one batch of twice the rows, so that dense weights are read once per token.

Shapes: B batch, S sequence, V vocabulary. Rows 0 .. B-1 are the strong stream, rows B .. 2B-1 the weak one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.generation.utils import ALL_CACHE_NAMES

from .output import cache_bytes
from .streams import find_cache, prepare_cache, without_cache


__all__ = ["FusedStreams", "why_not_fused"]

# Arguments of a forward pass that have one row per sequence.
ROW_ARGUMENTS = ("attention_mask", "position_ids", "token_type_ids", "inputs_embeds")


class FusedStreams:
    """One forward pass per token for both streams. See [`~hf_moe.generation.streams.SeparateStreams`] for the rest."""

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        input_ids: torch.Tensor,
        weak: Callable[[], AbstractContextManager],
    ):
        self.model, self.generation_config, self.weak = model, generation_config, weak
        self.batch = input_ids.shape[0]
        # position ids without padding are one row for the whole batch and stay so
        self.kwargs = {
            name: torch.cat([value, value]) if name in ROW_ARGUMENTS and _rows(value) == self.batch else value
            for name, value in without_cache(model_kwargs).items()
        }
        prepare_cache(model, generation_config, self.kwargs, torch.cat([input_ids, input_ids]))

    def prefill(self, input_ids: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Run the prompt; returns the strong outputs and both logits, `(B, V)` each."""
        with self.weak():
            outputs = self.model._prefill(torch.cat([input_ids, input_ids]), self.generation_config, self.kwargs)
        return self._advance(outputs)

    def step(self, input_ids: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Run the newest token; returns as [`FusedStreams.prefill`]."""
        length = 1 if self.kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(
            torch.cat([input_ids, input_ids]), next_sequence_length=length, **self.kwargs
        )
        with self.weak():
            outputs = self.model(**inputs, return_dict=True)
        return self._advance(outputs)

    def _advance(self, outputs: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        logits = outputs.logits[:, -1]
        kept = {name: tree_map(self._strong_rows, outputs.get(name)) for name in ("attentions", "hidden_states")}
        return SimpleNamespace(**kept), logits[: self.batch], logits[self.batch :]

    def _strong_rows(self, value: Any) -> Any:
        return value[: self.batch] if isinstance(value, torch.Tensor) else value

    def weak_cache_bytes(self) -> int | None:
        """Memory of the weak rows of the cache."""
        total = cache_bytes(find_cache(self.kwargs))
        return None if total is None else total // 2

    def strong_cache(self) -> Any:
        """The cache to return: that of the strong rows. The streams cannot go on afterwards."""
        cache = find_cache(self.kwargs)
        if cache is not None:
            cache.batch_select_indices(torch.arange(self.batch))
        return cache


def why_not_fused(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], input_ids: torch.Tensor, layers: Sequence[Any]
) -> str | None:
    """What keeps both streams from being one batch, or `None`.

    Args:
        model ([`~transformers.PreTrainedModel`]): As `generate` hands it over.
        generation_config ([`~transformers.GenerationConfig`]): Prepared by `generate`.
        model_kwargs (`dict`): Prepared by `generate`.
        input_ids (`torch.LongTensor` of shape `(B, S)`): The prompt.
        layers (`Sequence` of [`~hf_moe.views.MoeLayerView`]): The model's MoE layers.

    Returns:
        `str`, *optional*: A clause that completes "both streams cannot share a batch: ".
    """
    cache = find_cache(model_kwargs)
    if getattr(cache, "_is_user_defined", False):
        return f"the {type(cache).__name__} that was passed in has a row per sequence, not two"
    if cache is None and model_kwargs.get("use_cache"):
        return f"{type(model).__name__} makes its cache itself, so that its number of rows cannot be chosen"
    if generation_config.return_dict_in_generate and cache is not None:
        for layer in cache.layers:
            if not hasattr(layer, "batch_select_indices"):
                return (
                    "`return_dict_in_generate=True` returns the cache of the strong stream, and "
                    f"{type(layer).__name__} cannot be cut to some of its rows"
                )
    for name, value in model_kwargs.items():
        if name in ALL_CACHE_NAMES or value is None or isinstance(value, (bool, int, float, str)):
            continue
        whole_batch = name == "position_ids" and _rows(value) == 1
        if name not in ROW_ARGUMENTS or not (whole_batch or _rows(value) == input_ids.shape[0]):
            return f"`{name}` has no row per sequence that could be doubled"
    if model_kwargs.get("position_ids") is not None and model_kwargs["position_ids"].dim() != 2:
        return "`position_ids` has more than two dimensions"
    if any(layer.router.training and getattr(layer.router, "capacity_factor", None) is not None for layer in layers):
        return "in training mode the streams would compete for the experts' capacity"
    return None


def _rows(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() > 0 else None
