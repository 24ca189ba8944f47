"""Waveforms of any length in the segments that audio encoders take, and videos in their number of frames."""

from typing import Any

import numpy as np


__all__ = ["as_list_of_videos", "as_list_of_waveforms", "cut", "sample_frames", "segment_samples"]


def segment_samples(extractor: Any) -> int:
    """Samples of one segment: 30 s for Whisper, `max_length` frames of 10 ms for the audio spectrogram transformer.

    Args:
        extractor (`FeatureExtractionMixin`): With `n_samples`, or `max_length` and `sampling_rate`.

    Returns:
        `int`
    """
    samples = getattr(extractor, "n_samples", None)
    return int(samples) if samples is not None else int(extractor.max_length) * extractor.sampling_rate // 100


def cut(waveform: Any, samples: int, shortest: int = 1) -> tuple[list[np.ndarray], list[int]]:
    """Every started segment counts; the last may be shorter than the others.

    Args:
        waveform (array of shape `(n,)`): Sound.
        samples (`int`): Length of a segment.
        shortest (`int`, defaults to 1): A shorter last segment is filled up to this with zeros.

    Returns:
        `tuple[list[np.ndarray], list[int]]`: Segments, and how many samples of each are sound.

    Raises:
        ValueError: no sound, or more than one channel.
    """
    wave = np.asarray(waveform, dtype=np.float32)
    if wave.ndim != 1 or not len(wave):
        raise ValueError(
            "Speech and sounds must be waveforms with one channel and at least one sample, got the shape "
            f"{wave.shape}."
        )
    parts = [wave[start : start + samples] for start in range(0, len(wave), samples)]
    lengths = [len(part) for part in parts]
    parts[-1] = np.pad(parts[-1], (0, max(0, shortest - lengths[-1])))
    return parts, lengths


def as_list_of_waveforms(waveforms: Any) -> list[Any]:
    """One waveform, or several, or lists of them, as one list."""
    if hasattr(waveforms, "shape") and len(waveforms.shape) == 1:
        return [waveforms]
    if len(waveforms) and isinstance(waveforms[0], (float, int)):
        return [waveforms]
    flat = []
    for item in waveforms:
        is_list = isinstance(item, (list, tuple)) and len(item) and not isinstance(item[0], (float, int))
        flat.extend(item if is_list else [item])
    return flat


def as_list_of_videos(videos: Any) -> list[Any]:
    """One video (an array with four dimensions, or a list of frames), or several, as a list of videos."""
    if hasattr(videos, "shape"):
        return [videos] if len(videos.shape) == 4 else list(videos)
    first = videos[0]
    several = isinstance(first, (list, tuple)) or (hasattr(first, "shape") and len(first.shape) == 4)
    return list(videos) if several else [videos]


def sample_frames(video: Any, count: int) -> list[Any]:
    """`count` frames spread evenly over a video; a shorter one has frames repeated.

    Args:
        video: Frames, as an array or a list.
        count (`int`): How many to take.

    Returns:
        `list`

    Raises:
        ValueError: a video without frames.
    """
    if not len(video):
        raise ValueError("`videos` has a video without frames.")
    return [video[round(i)] for i in np.linspace(0, len(video) - 1, count).tolist()]
