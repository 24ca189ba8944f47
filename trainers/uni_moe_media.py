"""Pictures and sounds as data sets hold them, in the form a processor reads."""

import io
from collections.abc import Sequence
from typing import Any


__all__ = ["MEDIA", "decoded", "media_of"]

#: Columns of the data, and what they hold.
MEDIA = {"images": "image", "videos": "video", "speech": "speech", "audio": "audio"}


def media_of(row: dict[str, Any], column: str) -> Sequence[Any]:
    """The media in one column of a row.

    Args:
        row (`dict`): A row of the data.
        column (`str`): One of `MEDIA`.

    Returns:
        `Sequence`: Empty if there are none.

    Raises:
        ValueError: no list.
    """
    items = row.get(column)
    if items is not None and not isinstance(items, (list, tuple)):
        raise ValueError(f"`{column}` must hold a list in each row, got a {type(items).__name__}: `[item]` for one.")
    return items or ()


def decoded(item: Any, sampling_rate: int | None = None) -> Any:
    """An item, read if it is still a file: `{"bytes", "path"}` as datasets stores pictures within lists, and what it
    makes of sounds, `{"array", "sampling_rate"}` or a decoder of torchcodec.

    Args:
        item: A picture, a video as a list of them, or a sound; returned as it is if it is read already.
        sampling_rate (`int`, *optional*): What sounds must have.

    Returns:
        A `PIL.Image`, a list of them, or a waveform with one channel.

    Raises:
        ValueError: another sampling rate.
    """
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], dict):
        return [decoded(frame) for frame in item]
    if hasattr(item, "get_all_samples"):
        samples: Any = item.get_all_samples()  # type: ignore[union-attr]
        item = {"array": samples.data.mean(0), "sampling_rate": samples.sample_rate}
    if not isinstance(item, dict):
        return item
    if "array" in item:
        if None not in (sampling_rate, item.get("sampling_rate")) and item["sampling_rate"] != sampling_rate:
            raise ValueError(
                f"a sound has a sampling rate of {item['sampling_rate']}, but the model's is {sampling_rate}: "
                f"resample it, for instance with `dataset.cast_column(..., Audio(sampling_rate={sampling_rate}))`."
            )
        return item["array"]
    from PIL import Image

    with Image.open(io.BytesIO(item["bytes"]) if item.get("bytes") is not None else item["path"]) as picture:
        return picture.copy()
