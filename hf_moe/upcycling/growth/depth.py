"""Which layer of the small model each layer of the deeper one starts from."""

__all__ = ["DEPTHS", "depth_map", "inserted_layers"]

DEPTHS = ("interpolate", "stack", "identity")


def depth_map(old: int, new: int, depth: str = "interpolate") -> list[int]:
    """Source layer of every layer.

    Args:
        old (`int`): Layers L1 of the small model.
        new (`int`): Layers L2 of the deeper one.
        depth (`str`, defaults to `"interpolate"`): `"interpolate"`: floor(l L1 / L2), copies beside their originals
            (the paper prints the inverse ratio); `"stack"`: l mod L1; `"identity"`: as interpolation, but the copies
            start without any effect, see [`inserted_layers`].

    Returns:
        `list[int]` of length L2.

    Example:

    ```python
    >>> depth_map(3, 6, "interpolate"), depth_map(3, 6, "stack")
    ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2])
    ```
    """
    if depth == "stack":
        return [layer % old for layer in range(new)]
    return [layer * old // new for layer in range(new)]


def inserted_layers(layers: list[int]) -> set[int]:
    """Layers that are not the first copy of theirs."""
    return {position for position, layer in enumerate(layers) if layer in layers[:position]}
