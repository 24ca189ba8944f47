"""The decoding loop that both modes share. Shapes: B batch, S sequence, V vocabulary."""

from collections.abc import Callable
from typing import Any, cast

import torch

from .output import SelfContrastOutput


__all__ = ["decode"]


def decode(
    model: Any,
    input_ids: torch.Tensor,
    streams: Any,
    contrast: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
) -> Any:
    """Generate with both streams until every sequence is finished.

    Processors see the contrasted scores: temperature, top-p and penalties act after the contrast. Nothing is banned.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        input_ids (`torch.LongTensor` of shape `(B, S)`): The prompt.
        streams: [`~hf_moe.generation.streams.SeparateStreams`] or [`~hf_moe.generation.fused.FusedStreams`].
        contrast (`Callable`): From strong and weak logits to scores, all `(B, V)`.
        logits_processor (`LogitsProcessorList`): Prepared by `generate`.
        stopping_criteria (`StoppingCriteriaList`): Prepared by `generate`.
        generation_config ([`~transformers.GenerationConfig`]): Prepared by `generate`.
        synced_gpus (`bool`, *optional*, defaults to `False`): Go on until every process is finished.
        streamer (`BaseStreamer`, *optional*): Gets every new token and the end.

    Returns:
        `torch.LongTensor` of shape `(B, S + new)`, or [`SelfContrastOutput`].
    """
    config = generation_config
    keep = config.return_dict_in_generate
    kept: dict[str, list] = {
        name: []
        for name, wanted in {
            "scores": config.output_scores,
            "logits": config.output_logits,
            "weak_logits": config.output_logits,
            "attentions": config.output_attentions,
            "hidden_states": config.output_hidden_states,
        }.items()
        if keep and wanted
    }
    pad = config._pad_token_tensor
    has_eos = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    finished = False

    def advance(forward: Callable) -> None:
        nonlocal input_ids, unfinished, finished
        outputs, strong, weak = forward(input_ids)
        if synced_gpus and finished:  # another process still needs this forward pass
            return
        strong, weak = (z.to(copy=True, dtype=torch.float32, device=input_ids.device) for z in (strong, weak))
        scores = logits_processor(input_ids, contrast(strong, weak))
        found = {
            "scores": scores,
            "logits": strong,
            "weak_logits": weak,
            "attentions": outputs.attentions if "attentions" in kept else None,
            "hidden_states": outputs.hidden_states if "hidden_states" in kept else None,
        }
        for name, values in kept.items():
            values.append(found[name])
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if has_eos:
            tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        past_scores = tuple(kept["scores"]) if "scores" in kept else None
        unfinished = unfinished & ~stopping_criteria(input_ids, past_scores)
        finished = bool(unfinished.max() == 0)

    advance(streams.prefill)
    with model._optimize_model_for_decode():
        while model._has_unfinished_sequences(finished, synced_gpus, device=input_ids.device):
            advance(streams.step)
    if streamer is not None:
        streamer.end()
    if not keep:
        return input_ids
    return SelfContrastOutput(
        sequences=cast(torch.LongTensor, input_ids),
        weak_cache_bytes=streams.weak_cache_bytes(),
        past_key_values=streams.strong_cache(),
        **{name: tuple(values) for name, values in kept.items()},
    )
