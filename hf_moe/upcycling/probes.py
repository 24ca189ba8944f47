"""Random inputs on which a dense model and what was made of it can be compared."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .statistics import random_batch


__all__ = ["complete", "probe_batch", "vocabulary"]


def vocabulary(model: PreTrainedModel) -> int | None:
    """Number of tokens a model reads, `None` where it reads none (or not only tokens)."""
    return getattr(_text_config(model), "vocab_size", None)


def probe_batch(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens; for a model that sees images too, after a random image."""
    batch = random_batch(vocabulary(model) or 0, seed, length=_length(model))
    return complete(model, _with_image(model, batch, seed))


def complete(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch that a decoder beside an encoder can be run on too: by default it reads what the encoder reads."""
    given = ("decoder_input_ids", "decoder_inputs_embeds")
    if not getattr(model.config, "is_encoder_decoder", False) or any(name in batch for name in given):
        return batch
    shifted: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if "labels" in batch and shifted is not None:
        return {**batch, "decoder_input_ids": shifted(labels=batch["labels"])}
    return {**batch, "decoder_input_ids": batch["input_ids"]}


def _text_config(model: PreTrainedModel) -> Any:
    has_language_model = hasattr(model.base_model, "language_model")
    return model.config.get_text_config() if has_language_model else model.config


def _length(model: PreTrainedModel) -> int:
    """Tokens of the random batch: within the positions the model has."""
    positions = getattr(_text_config(model), "max_position_embeddings", None) or 128
    table: Any = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if getattr(table, "padding_idx", None) is not None:  # RoBERTa counts from there
        positions -= table.padding_idx + 1
    return max(1, min(128, positions))


@torch.no_grad()
def _with_image(model: Any, batch: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The batch with one image at its beginning, where the model's tower takes square images of a fixed size."""
    token = getattr(model.config, "image_token_id", None)
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    ids = batch["input_ids"]
    if token is None:
        return batch
    ids = ids.masked_fill(ids == token, (token + 1) % (vocabulary(model) or 1))
    if not isinstance(size, int):
        return {"input_ids": ids}
    shape = (1, getattr(vision, "num_channels", 3), size, size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device, model.dtype)
    places = sum(len(image) for image in model.get_image_features(pixels, return_dict=True).pooler_output)
    image = torch.full((1, places), token)
    return {"input_ids": torch.cat([image, ids[:, : max(1, _length(model) - places)]], dim=1), "pixel_values": pixels}
