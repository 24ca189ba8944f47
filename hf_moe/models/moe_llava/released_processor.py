"""The processor for a released MoE-LLaVA: its tokenizer with an image token, and the tower's image processor."""

import os
from typing import Any

from transformers import AddedToken, AutoImageProcessor, AutoTokenizer, CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor


__all__ = ["released_processor"]

IMAGE_TOKEN = "<image>"


def released_processor(tokenizer: str | os.PathLike, tower: str, vision_config: Any, select: str) -> LlavaProcessor:
    """Makes it.

    Args:
        tokenizer (`str` or `os.PathLike`): Folder or Hub id of the tokenizer.
        tower (`str`): Folder or Hub id of the vision tower; without an image processor, CLIP's is used.
        vision_config (`PreTrainedConfig`): Its config.
        select (`str`): `"default"` where the tower's class token is left out.

    Returns:
        `LlavaProcessor`

    Raises:
        ValueError: the tokenizer cannot be loaded without code of its own.
    """
    try:
        loaded: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {os.fspath(tokenizer)!r} without code of its own. Pass `tokenizer`, "
            'such as "stabilityai/stablelm-2-1_6b" for the StableLM releases.'
        ) from error
    loaded.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.unk_token or loaded.eos_token
    try:
        image_processor: Any = AutoImageProcessor.from_pretrained(tower, use_fast=False)
    except (OSError, ValueError):
        side = vision_config.image_size
        sizes: Any = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        image_processor = CLIPImageProcessorPil(**sizes)
    return LlavaProcessor(
        image_processor,
        loaded,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1 if select == "default" else 0,
    )
