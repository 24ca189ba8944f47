"""Media in the places that prompts keep for them, and what is said when they do not fit.

Shapes: B batch, S sequence, M media items, n rows per item, D hidden.
"""

from typing import Any

import torch

from .configuration_uni_moe import ENCODERS


__all__ = ["INPUTS", "check_inputs", "expand_media", "splice"]

#: The argument that holds each modality.
INPUTS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "speech": "input_features",
    "audio": "audio_values",
}
# Names that other processors use.
OTHER_NAMES = {
    "input_values": "audio_values",
    "speech_values": "input_features",
    "video_values": "pixel_values_videos",
}


def check_inputs(config: Any, media: dict[str, torch.Tensor], others: dict[str, Any]) -> None:
    """Refuses media that nobody would read.

    Args:
        config ([`UniMoeConfig`]): Of the model.
        media (`dict`): Inputs by modality.
        others (`dict`): The remaining keyword arguments.

    Raises:
        ValueError: a modality without encoder or placeholder, or an argument under another model's name.
    """
    for name, right in OTHER_NAMES.items():
        if others.get(name) is not None:
            raise ValueError(f"`{name}` is not read by `uni_moe`: pass `{right}`, as its processor does.")
    for modality in media:
        if config.encoder_config(modality) is None:
            raise ValueError(
                f"`{INPUTS[modality]}`: this `uni_moe` has no encoder for {modality} "
                f"(`config.{ENCODERS[modality]}_config` is None)."
            )
        if modality not in config.token_ids:
            raise ValueError(
                f"`{INPUTS[modality]}`: this `uni_moe` has no placeholder for {modality} "
                f"(`config.{modality}_token_id` is None)."
            )


def splice(
    config: Any,
    input_ids: torch.Tensor | None,
    embeds: torch.Tensor,
    features: dict[str, torch.Tensor],
    past_key_values: Any = None,
) -> torch.Tensor:
    """Writes rows of media over the embeddings of their placeholders, in order. Counts are not checked while
    compiling.

    Args:
        config ([`UniMoeConfig`]): Of the model.
        input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): The prompt.
        embeds (`torch.Tensor` of shape `(B, S, D)`): Its embeddings.
        features (`dict[str, torch.Tensor]`): `(M, n, D)` by modality.
        past_key_values (*optional*): A cache with something in it: the media came with an earlier call, and a model
            may well answer with a placeholder.

    Returns:
        `torch.Tensor` of shape `(B, S, D)`.

    Raises:
        ValueError: media without `input_ids`, placeholders without media, or not as many as there are rows.
    """
    if input_ids is None:
        if features:
            name = INPUTS[next(iter(features))]
            raise ValueError(f"`{name}` needs `input_ids`: embeddings do not say where the placeholders are.")
        return embeds
    later = past_key_values is not None and past_key_values.get_seq_length() > 0
    silent = torch.compiler.is_compiling() or input_ids.device.type == "meta"
    for modality, token_id in config.token_ids.items():
        places = input_ids == token_id
        rows = features.get(modality)
        if not silent and (rows is not None or not later):
            _check_count(modality, token_id, int(places.sum()), rows)
        if rows is not None:
            rows = rows.flatten(0, 1).to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(places.unsqueeze(-1).to(embeds.device), rows)
    return embeds


def _check_count(modality: str, token_id: int, found: int, rows: torch.Tensor | None) -> None:
    if rows is None:
        if found:
            raise ValueError(
                f"`input_ids` has {found} {modality} tokens (id {token_id}), but there is no {modality}: pass "
                f"`{INPUTS[modality]}`, as the processor returns it."
            )
        return
    items, each = rows.shape[:2]
    if found != items * each:
        cut = " If a trainer cut the prompt, set its `max_length=None`." if found < items * each else ""
        raise ValueError(
            f"`input_ids` has {found} {modality} tokens (id {token_id}), but `{INPUTS[modality]}` has {items} items "
            f"that need {items * each} ({each} each). Let the processor expand one token per item: its numbers of "
            f"tokens must be the model's.{cut}"
        )


def expand_media(config: Any, input_ids: torch.Tensor, inputs: dict[str, Any], size: int) -> dict[str, Any]:
    """Media for a batch whose rows are each repeated `size` times (beams, several answers). A row may have any number
    of items, so repeating each item would put them in the wrong order.

    Args:
        config ([`UniMoeConfig`]): Of the model.
        input_ids (`torch.Tensor` of shape `(B, S)`): The prompts, not repeated.
        inputs (`dict`): Keyword arguments of the model; only media are repeated.
        size (`int`): How often.

    Returns:
        `dict`: The media among `inputs`, repeated.
    """
    expanded = {}
    for modality, name in INPUTS.items():
        media = inputs.get(name)
        if media is None or modality not in config.token_ids:
            continue
        counts = (input_ids == config.token_ids[modality]).sum(-1)
        each = max(int(counts.sum()) // len(media), 1)
        items = (counts // each).tolist()
        for key in (name, "audio_mask") if modality == "audio" else (name,):
            if inputs.get(key) is not None and sum(items) == len(media):  # else the model says what is wrong
                parts = inputs[key].split(items)
                expanded[key] = torch.cat([part for part in parts for _ in range(size)])
    return expanded
