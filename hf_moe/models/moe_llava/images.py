"""What is wrong with the images of a call, said before anything is computed with them."""

from collections.abc import Sequence
from typing import Any

import torch


__all__ = ["check_image_tokens", "check_modalities"]

# Names under which processors hand over what this model has no encoder for.
OTHER_MODALITIES = {
    "pixel_values_videos": "video",
    "input_features": "audio",
    "input_values": "audio",
    "audio_values": "audio",
}


def check_modalities(inputs: dict[str, Any]) -> None:
    """Refuses inputs of a modality without an encoder; they would be ignored silently.

    Args:
        inputs (`dict`): Keyword arguments of the call.

    Raises:
        ValueError: the first such argument.
    """
    for name, modality in OTHER_MODALITIES.items():
        if inputs.get(name) is not None:
            raise ValueError(
                f"`{name}`: `moe_llava` has an encoder for images (`pixel_values`) and none for {modality}."
            )


def check_image_tokens(
    config: Any, input_ids: torch.Tensor | None, images: Sequence[torch.Tensor] | None, past_key_values: Any = None
) -> None:
    """Compares the image tokens of a prompt with what the vision tower gave. Nothing is checked while compiling.

    Args:
        config ([`MoeLlavaConfig`]): Of the model.
        input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): The prompt; unknown where embeddings were passed.
        images (`Sequence[torch.Tensor]`, *optional*): One tensor `(patches, D)` per image.
        past_key_values (*optional*): A cache with something in it: the images came with an earlier call, and a model
            may well answer with an image token.

    Raises:
        ValueError: image tokens without images, or not as many as there are patches.
    """
    if input_ids is None or torch.compiler.is_compiling() or input_ids.device.type == "meta":
        return
    if images is None and past_key_values is not None and past_key_values.get_seq_length() > 0:
        return
    found = int((input_ids == config.image_token_index).sum())
    if images is None:
        if found:
            raise ValueError(
                f"`input_ids` has {found} image tokens (id {config.image_token_index}), but there are no images: pass "
                "`pixel_values`, as `processor(images=..., text=...)` returns them."
            )
        return
    wanted = [len(image) for image in images]
    if found != sum(wanted):
        each = f"{wanted[0]} each" if len(set(wanted)) == 1 else f"{wanted}"
        cut = " If a trainer cut the prompt, set its `max_length=None`." if found < sum(wanted) else ""
        raise ValueError(
            f"`input_ids` has {found} image tokens (id {config.image_token_index}), but {len(wanted)} images need "
            f"{sum(wanted)} ({each}). Write one image token per image into the text and let the processor expand it: "
            "its image token, `patch_size`, `num_additional_image_tokens` and `vision_feature_select_strategy` must "
            f"be the model's.{cut}"
        )
