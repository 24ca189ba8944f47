"""The modality of each token of a call: from its ids, or as it was given. Shapes: B batch, S sequence."""

from functools import partial
from typing import Any

import torch

from hf_moe.adapters.core import Runtime


__all__ = ["modality_map", "rows_by_modality"]

MASK = "modality_mask"


def modality_map(
    runtime: Runtime, adapter_name: str, config: Any, batch: int, length: int, device: torch.device
) -> torch.Tensor | None:
    """Number of each token's modality.

    Args:
        runtime ([`~hf_moe.adapters.core.Runtime`]): The call's `input_ids` and `modality_mask`.
        adapter_name (`str`): Of the adapter that asks.
        config ([`PillConfig`]): Its config.
        batch (`int`): B of the hidden states.
        length (`int`): S of the hidden states.
        device (`torch.device`): Theirs.

    Returns:
        `torch.Tensor` of shape `(B, S)`, or `None` when every token is of the first modality.

    Raises:
        ValueError: The map does not fit the sequence, has a number that is no modality, or is missing for a call
            with `inputs_embeds`.
        TypeError: The map is no tensor of integers or booleans.
    """
    mask = runtime.get(MASK)
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise TypeError(f"`{MASK}` must be a tensor of shape (batch, sequence), got {type(mask).__name__}.")
    if length == 1 and (mask is None or mask.shape[-1] != 1):
        return None  # a decoding step: what a model generates is text
    modality = runtime.derive(f"pill.{adapter_name}", partial(_of_the_call, config))
    if modality is None:
        return None
    if modality.shape[1] != length:
        raise ValueError(
            f"`{MASK}` (or `input_ids`) has {modality.shape[1]} tokens per row, but the model runs on {length}. Give "
            "one number per token of this call; with `generate`, one per token of the prompt and a cache."
        )
    if modality.shape[0] != batch:
        if batch % modality.shape[0]:
            raise ValueError(f"`{MASK}` has {modality.shape[0]} rows for a batch of {batch}.")
        modality = modality.repeat_interleave(batch // modality.shape[0], dim=0)  # as beam search repeats its input
    return modality.to(device)


def rows_by_modality(runtime: Runtime, adapter_name: str, modality: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Positions of each modality's tokens in the flattened batch, found once per call where possible.

    Args:
        runtime ([`~hf_moe.adapters.core.Runtime`]): Of the call.
        adapter_name (`str`): Of the adapter that asks.
        modality (`torch.Tensor` of shape `(B, S)`): What `modality_map` gave.
        number (`int`): How many modalities there are.

    Returns:
        `list[torch.Tensor]`: One-dimensional, by modality.
    """

    last = runtime.derive(f"pill.{adapter_name}.rows", lambda _: {})
    if last.get("modality") is not modality:  # a mixed batch asks with a tensor of its own in each layer
        flat = modality.reshape(-1)
        last["rows"] = [(flat == index).nonzero().squeeze(-1) for index in range(number)]
        last["modality"] = modality
    return last["rows"]


def _of_the_call(config: Any, runtime: Runtime) -> torch.Tensor | None:
    mask, ids = runtime.get(MASK), runtime.get("input_ids")
    if mask is not None:
        return _checked(mask, config.modalities)
    if ids is None:
        raise ValueError(
            f"A call with `inputs_embeds` does not say which tokens are {' or '.join(config.modalities[1:])}. Pass "
            f"`{MASK}` of shape (batch, sequence), zeros for text; `generate` takes it through "
            "`with hf_moe.adapters.core.condition(model, modality_mask=...)`."
        )
    if not config.modality_token_ids:
        return None
    modality = torch.zeros_like(ids, dtype=torch.long)
    for name, tokens in config.modality_token_ids.items():
        for token in tokens:
            modality = modality.masked_fill(ids == token, config.modalities.index(name))
    return modality


def _checked(mask: torch.Tensor, modalities: list[str]) -> torch.Tensor:
    if mask.ndim != 2:
        raise ValueError(f"`{MASK}` must have the shape (batch, sequence), got {tuple(mask.shape)}.")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"`{MASK}` must hold numbers of modalities as integers or booleans, got {mask.dtype}.")
    if mask.dtype == torch.bool and len(modalities) > 2:
        raise TypeError(
            f"`{MASK}` must hold integers for the {len(modalities)} modalities {modalities}, got booleans."
        )
    # Looking at values would break a compiled graph.
    if not torch.compiler.is_compiling() and mask.numel():
        low, high = int(mask.min()), int(mask.max())
        if low < 0 or high >= len(modalities):
            raise ValueError(
                f"`{MASK}` has the number {low if low < 0 else high}; modalities are numbered from 0 to "
                f"{len(modalities) - 1}: {modalities}."
            )
    return mask.long()
