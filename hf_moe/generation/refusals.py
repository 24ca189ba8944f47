"""What self-contrast decoding refuses, before anything runs."""

import inspect
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin

from .streams import find_cache


__all__ = ["arguments_kept_back", "check_cache", "check_mode"]


def check_mode(model: Any, generation_config: Any) -> None:
    """Refuses everything but greedy decoding and sampling with a decoder.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        generation_config ([`~transformers.GenerationConfig`]): Prepared by `generate`.

    Raises:
        ValueError: Beams, an assistant, another decoding method, or an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"Self-contrast decoding runs decoders, and `model` ({type(model).__name__}) is an encoder-decoder."
        )
    # said here, because transformers does not refuse beams for a callable and would return the same row several times
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"`num_beams` must be 1 with self-contrast decoding, got {generation_config.num_beams}. Sample several "
            "sequences with `do_sample=True, num_return_sequences=...` instead."
        )
    mode = generation_config.get_generation_mode()
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "Self-contrast decoding cannot run with an assistant. Remove `prompt_lookup_num_tokens`, "
            "`assistant_early_exit` and `use_mtp`."
        )
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"Self-contrast decoding is greedy or samples; the generation arguments ask for {mode.value!r}. Remove "
            "those that do (`penalty_alpha`, `dola_layers`, `constraints`, ...)."
        )


def check_cache(generation_config: Any, model_kwargs: dict[str, Any], input_ids: torch.Tensor) -> None:
    """Refuses a filled cache whose tokens are not in the prompt: the weak stream has to read them again.

    Args:
        generation_config ([`~transformers.GenerationConfig`]): Prepared by `generate`.
        model_kwargs (`dict`): Prepared by `generate`.
        input_ids (`torch.LongTensor` of shape `(B, S)`): The prompt.

    Raises:
        ValueError: The cache holds tokens that the prompt does not.
    """
    cache = find_cache(model_kwargs)
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    length = input_ids.shape[1] if embeds is None else embeds.shape[1]
    whole = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", length)
    if past and (length <= past or length != whole):
        raise ValueError(
            f"`past_key_values` holds {past} tokens, and the prompt has {length} of {max(whole, past + length)}. "
            "The weak stream has a cache of its own and reads the whole text again: pass `input_ids` with all tokens, "
            "those in the cache included."
        )


def arguments_kept_back() -> dict[str, Any]:
    """The arguments that the running `generate` accepted but hands to no callable.

    transformers drops them without a word: a streamer would wait for ever and an assistant would be ignored. The only
    place where they can be seen is the frame of `generate`.

    Returns:
        `dict`: `streamer`, `assistant_model` and `synced_gpus`; empty if `generate` is not the caller.
    """
    mixin: Any = GenerationMixin
    code = inspect.unwrap(mixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return {}
    return {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model", "synced_gpus")}
