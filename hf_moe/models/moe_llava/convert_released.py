"""Turns a released MoE-LLaVA checkpoint (LanguageBind/MoE-LLaVA-*, written by DeepSpeed) into a `moe_llava` one.

The released layout, with l the layer and e the expert:

| released, under `model.` | here, under `model.` |
|---|---|
| `layers.l.mlp.deepspeed_moe.gate.wg.weight` (N, D) | `language_model.layers.l.mlp.gate.weight` |
| `layers.l.mlp.deepspeed_moe.experts.deepspeed_experts.e.gate_proj`, `.up_proj` | `...mlp.experts.gate_up_proj` |
| `layers.l.mlp.deepspeed_moe.experts.deepspeed_experts.e.down_proj` | `...mlp.experts.down_proj` |
| the same with `fc1`, `fc2` and biases (Phi) | `...mlp.experts.up_proj`, `.down_proj` and `..._bias` |
| `layers.l.mlp.mlp`, `layers.l.mlp.coefficient` (residual) | `...mlp.residual_expert`, `...mlp.residual_gate` |
| `mm_projector.image_spatial_proj.{0,2}.*` | `multi_modal_projector.linear_{1,2}.*` |
| `image_tower.image_tower.vision_model.*`, where it was saved | `vision_tower.*` |
| everything else | the same under `language_model.` |
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from hf_moe.checkpoints import CheckpointReader
from hf_moe.models.released import find_released, read_released_config, write_converted

from .configuration_moe_llava import MoeLlavaConfig
from .released_config import released_text_config


__all__ = ["convert_released"]

logger = logging.get_logger(__name__)

TOWER = "model.image_tower.image_tower.vision_model."
# Ours -> released, within an expert or a residual branch.
PROJECTIONS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
PHI_PROJECTIONS = {"up_proj": "fc1", "down_proj": "fc2"}


def convert_released(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    vision_tower: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    max_shard_bytes: int = 2 * 10**9,
) -> Path:
    """Writes a released MoE-LLaVA checkpoint as a `moe_llava` model folder that `AutoModelForImageTextToText` loads,
    with its processor.

    Works a tensor at a time: memory holds one shard and one layer. The folder appears when it is complete, or not at
    all. Values and their dtypes are copied. Files are read as tensors only; nothing in them is executed.

    The released code marks images by an id outside of the vocabulary; here `<image>` is added to the tokenizer. Where
    the embedding has no spare row for it, one is added: the mean of the others.

    Note: outputs are those of the released code without its noise and without its capacity at evaluation (both draw
    other answers for the same question), up to rounding: here routers work in float32. Note: the release pads images
    to squares, which is left to the caller; the processor written here crops, as CLIP's does.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id of a checkpoint in the released layout, safetensors or
            `pytorch_model*.bin`.
        destination (`str` or `os.PathLike`): The folder to make; it may exist if it is empty.
        vision_tower (`str` or `os.PathLike`, *optional*): Folder or Hub id of the tower, for its config and, where the
            release does not hold them, its weights; by default what the release names.
        tokenizer (`str` or `os.PathLike`, *optional*): Folder or Hub id of the tokenizer, where that of the release
            needs code of its own (StableLM: `"stabilityai/stablelm-2-1_6b"`).
        max_shard_bytes (`int`, defaults to 2 GB): Largest size of one weight file.

    Returns:
        `Path`: `destination`.

    Raises:
        ValueError: not the released layout, a language model without a backbone here (Qwen-1, MiniCPM), tensors
            missing, of another shape or too many, a damaged file, no tokenizer, or a destination that exists.

    Example:

    ```python
    >>> convert_released("LanguageBind/MoE-LLaVA-Phi2-2.7B-4e", "moe-llava-phi")
    >>> model = AutoModelForImageTextToText.from_pretrained("moe-llava-phi", dtype="auto")
    ```
    """
    from .modeling_moe_llava import MoeLlavaForConditionalGeneration
    from .released_processor import released_processor

    source = find_released(source)
    released = read_released_config(source)
    text_config = released_text_config(released)
    tower = os.fspath(vision_tower or released["mm_image_tower"])
    vision_config = _vision_config(tower)
    select = "full" if "siglip" in vision_config.model_type else "default"
    if released.get("mm_vision_select_feature", "patch") == "cls_patch":
        select = "full"
    processor = released_processor(tokenizer or source, tower, vision_config, select)
    image_token = processor.image_token_id
    rows = text_config["vocab_size"]
    text_config["vocab_size"] = rows = max(rows, -(-(image_token + 1) // 64) * 64 if image_token >= rows else 0)
    side = vision_config.image_size // vision_config.patch_size
    config = MoeLlavaConfig(
        vision_config=vision_config,
        text_config=AutoConfig.for_model(**text_config),
        image_token_index=image_token,
        image_seq_length=side * side,
        vision_feature_layer=released.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=select,
        lm_head_bias=text_config["model_type"] == "moe_phi",
    )
    keys = CheckpointReader(source).keys()
    lacking: dict[str, torch.Tensor] = {
        f"model.language_model.layers.{layer}.mlp.gate.temperature": torch.ones(())
        for layer in config.moe_layer_indices
    }
    if not any(key.startswith(TOWER) for key in keys):
        lacking |= _tower_weights(tower, vision_config)
    write_converted(
        source,
        destination,
        config,
        MoeLlavaForConditionalGeneration,
        lambda name: _pieces(name, config),
        buffers=lacking,
        unused=[key for key in keys if key.endswith("embeddings.position_ids")],
        deciding_fields=("moe", "num_hidden_layers", "mm_image_tower"),
        growing=("model.language_model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"),
        max_shard_bytes=max_shard_bytes,
    )
    processor.save_pretrained(destination)
    logger.info(f"Wrote {destination}.")
    return Path(destination)


def _vision_config(tower: str) -> Any:
    config = AutoConfig.from_pretrained(tower)
    config = getattr(config, "vision_config", config)  # of a whole CLIP
    if not isinstance(getattr(config, "image_size", None), int):
        raise ValueError(
            f"`vision_tower={tower!r}` ({config.model_type}) is no tower of square images, such as CLIP's."
        )
    return config


def _tower_weights(tower: str, vision_config: Any) -> dict[str, torch.Tensor]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING[type(vision_config)]
    loaded: Any = model_class.from_pretrained(tower, dtype="auto", output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"`vision_tower={tower!r}` lacks {len(info['missing_keys'])} weights of a {type(model).__name__}, the "
            f"first is {sorted(info['missing_keys'])[0]!r}. The release has none either: give a complete tower."
        )
    return {f"model.vision_tower.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def _pieces(name: str, config: MoeLlavaConfig) -> list[str | tuple[str, ...]]:
    """The released tensors that make the parameter `name`."""
    if name.startswith("model.vision_tower."):
        return [TOWER + name.removeprefix("model.vision_tower.")]
    if name.startswith("model.multi_modal_projector."):
        _, _, linear, kind = name.split(".")
        return [f"model.mm_projector.image_spatial_proj.{0 if linear == 'linear_1' else 2}.{kind}"]
    name = name.replace("model.language_model.", "model.")
    block = re.fullmatch(r"(model\.layers\.(\d+)\.mlp)\.(gate|experts|residual_expert|residual_gate)\.(.+)", name)
    if block is None:
        return [name]
    path, layer, part, own = block[1], int(block[2]), block[3], block[4]
    if part == "gate" and own == "weight":
        return [f"{path}.deepspeed_moe.gate.wg.weight"]
    if part == "residual_gate":
        return [f"{path}.coefficient.{own}"]
    names = PHI_PROJECTIONS if config.lm_head_bias else PROJECTIONS  # Phi alone has a bias there
    if part == "residual_expert":
        projection, _, kind = own.partition(".")
        return [f"{path}.mlp.{names[projection]}.{kind}"]
    count = dict(zip(config.moe_layer_indices, config.experts_per_layer, strict=True))[layer]
    experts = [f"{path}.deepspeed_moe.experts.deepspeed_experts.{e}" for e in range(count)]
    if own == "gate_up_proj":
        return [(f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight") for expert in experts]
    kind = "bias" if own.endswith("_bias") else "weight"
    return [f"{expert}.{names[own.removesuffix('_bias')]}.{kind}" for expert in experts]
