"""What the encoders see in images, videos, speech and sounds.

Shapes: M media items, F frames, P rows of an encoder, E its width.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder


__all__ = ["audio_features", "build_encoder", "image_features", "running", "speech_features", "video_features"]


def build_encoder(config: Any) -> nn.Module:
    """An encoder from its config: of a Whisper only the encoder, of other types what `AutoModel` gives."""
    # What was asked for the experts was handed to every part, and a model without any refuses it.
    config._experts_implementation = None
    if config.model_type == "whisper":
        return WhisperEncoder._from_config(config)
    return AutoModel.from_config(config)


def running(encoder: nn.Module, frozen: bool) -> Any:
    """Context in which an encoder runs: without gradients if it is frozen or has nothing to train."""
    if frozen or not any(parameter.requires_grad for parameter in encoder.parameters()):
        return torch.no_grad()
    return contextlib.nullcontext()


def image_features(encoder: Any, pixel_values: torch.Tensor, layer: int = -2) -> torch.Tensor:
    """Patches of images.

    Args:
        encoder: `CLIPVisionModel`, or another with `hidden_states`.
        pixel_values (`torch.Tensor` of shape `(M, 3, H, W)`): Images.
        layer (`int`, defaults to -2): Hidden states to take.

    Returns:
        `torch.Tensor` of shape `(M, P, E)`: Without a class token.
    """
    rows = encoder(pixel_values.to(_dtype(encoder)), output_hidden_states=True).hidden_states[layer]
    patches = (encoder.config.image_size // encoder.config.patch_size) ** 2
    return rows[:, rows.shape[1] - patches :]


def video_features(encoder: Any, pixel_values: torch.Tensor, layer: int = -2, pool: str = "mean") -> torch.Tensor:
    """Patches of videos, averaged over frames or one frame after the other.

    Args:
        encoder: As in [`image_features`].
        pixel_values (`torch.Tensor` of shape `(M, F, 3, H, W)`): Frames.
        layer (`int`, defaults to -2): Hidden states to take.
        pool (`str`, defaults to `"mean"`): `"mean"` gives `(M, P, E)`, `"concat"` `(M, F P, E)`.

    Returns:
        `torch.Tensor`

    Raises:
        ValueError: not five dimensions.
    """
    if pixel_values.ndim != 5:
        raise ValueError(
            f"`pixel_values_videos` must have the shape (videos, frames, 3, H, W), got {tuple(pixel_values.shape)}."
        )
    rows = image_features(encoder, pixel_values.flatten(0, 1), layer)
    rows = rows.unflatten(0, pixel_values.shape[:2])  # (M, F, P, E)
    return rows.mean(1) if pool == "mean" else rows.flatten(1, 2)


def speech_features(encoder: Any, input_features: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder on segments of 30 s.

    Args:
        encoder (`WhisperEncoder`): The encoder.
        input_features (`torch.Tensor` of shape `(M, mels, frames)`): Log-mel spectrograms, padded to 30 s.

    Returns:
        `torch.Tensor` of shape `(M, P, E)`.
    """
    return encoder(input_features.to(_dtype(encoder))).last_hidden_state


def audio_features(
    encoder: Any, values: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An audio encoder on segments of sound; padding is masked where the encoder can (audio spectrogram transformer).

    Args:
        encoder: `ASTModel`, or another that takes a spectrogram.
        values (`torch.Tensor` of shape `(M, frames, mels)`): Spectrograms.
        mask (`torch.Tensor` of shape `(M, frames)`, *optional*): 1 where there is sound.

    Returns:
        `tuple`: `(M, P, E)`, and the mask of its rows `(M, P)` or `None`.
    """
    values = values.to(_dtype(encoder))
    if mask is None or encoder.config.model_type != "audio-spectrogram-transformer":
        return encoder(values).last_hidden_state, None
    rows = _patch_mask(encoder.config, mask)
    return encoder(values, attention_mask=rows).last_hidden_state, rows


def _patch_mask(config: Any, mask: torch.Tensor) -> torch.Tensor:
    """A patch counts if its first frame does; class and distillation token always do. Patches are laid out by
    frequency, then time."""
    size = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    bands = (config.num_mel_bins - size) // config.frequency_stride + 1
    steps = (config.max_length - size) // config.time_stride + 1
    times = mask[:, :: config.time_stride][:, :steps].to(torch.long)  # (M, steps)
    return torch.cat([times.new_ones(len(times), 2), times.repeat(1, bands)], dim=1)


def _dtype(encoder: nn.Module) -> torch.dtype:
    return next(encoder.parameters()).dtype
