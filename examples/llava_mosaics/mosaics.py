"""Mosaics: two by two cells, each empty or with a picture of Fashion-MNIST, 56 x 56 pixels.

Some classes are never at some place in training (`NEVER_TOGETHER`): what a model says about those in held-out mosaics
it cannot have learned by heart.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image


__all__ = ["NEVER_TOGETHER", "PLACES", "SIDE", "WORDS", "Mosaic", "caption", "draw_mosaics", "has_unseen", "picture"]

#: One word for each class of Fashion-MNIST, in its order.
WORDS = ("tee", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PLACES = ("top left", "top right", "bottom left", "bottom right")
#: Pairs of class and place that no training mosaic has: trousers top right, dress bottom left, sneaker top left, bag
#: bottom right.
NEVER_TOGETHER = frozenset({(1, 1), (3, 2), (7, 0), (8, 3)})
#: Pixels of a mosaic's side.
SIDE = 56
_EMPTY, _REPEATED = 0.2, 0.25


@dataclass(frozen=True)
class Mosaic:
    """Which pictures a mosaic is made of, by place.

    Args:
        labels (`tuple[int | None, ...]`): Four classes; `None` is an empty cell.
        rows (`tuple[int, ...]`): Which pictures.
    """

    labels: tuple[int | None, ...]
    rows: tuple[int, ...]


def has_unseen(mosaic: Mosaic) -> bool:
    """Whether a class is where it never is in training."""
    return any((label, place) in NEVER_TOGETHER for place, label in enumerate(mosaic.labels))


def draw_mosaics(labels: np.ndarray, count: int, seed: int, unseen: bool = False) -> list[Mosaic]:
    """Random mosaics. A fifth of the cells is empty, and some classes are there more than once.

    Args:
        labels (`np.ndarray` of shape `(N,)`): Classes of the pictures.
        count (`int`): How many mosaics.
        seed (`int`): Of everything drawn.
        unseen (`bool`, defaults to `False`): Every mosaic has a class where it never is in training; else none has.

    Returns:
        `list[Mosaic]`
    """
    random = np.random.default_rng(seed)
    by_class = [np.flatnonzero(labels == label) for label in range(len(WORDS))]
    mosaics: list[Mosaic] = []
    while len(mosaics) < count:
        cells: list[int | None] = []
        for _ in range(4):
            known = [label for label in cells if label is not None]
            if random.random() < _EMPTY:
                cells.append(None)
            elif known and random.random() < _REPEATED:
                cells.append(known[random.integers(len(known))])
            else:
                cells.append(int(random.integers(len(WORDS))))
        if unseen:
            label, place = sorted(NEVER_TOGETHER)[random.integers(len(NEVER_TOGETHER))]
            cells[place] = label
        rows = tuple(0 if label is None else int(random.choice(by_class[label])) for label in cells)
        mosaic = Mosaic(tuple(cells), rows)
        if any(label is not None for label in cells) and has_unseen(mosaic) == unseen:
            mosaics.append(mosaic)
    return mosaics


def picture(mosaic: Mosaic, images: np.ndarray) -> Image.Image:
    """The mosaic as an image.

    Args:
        mosaic ([`Mosaic`]): What to draw.
        images (`np.ndarray` of shape `(N, 28, 28)`): The pictures.

    Returns:
        `PIL.Image.Image`: RGB, 56 x 56.
    """
    half = SIDE // 2
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    for place, (label, row) in enumerate(zip(mosaic.labels, mosaic.rows, strict=True)):
        if label is not None:
            y, x = half * (place // 2), half * (place % 2)
            pixels[y : y + half, x : x + half] = images[row]
    return Image.fromarray(pixels).convert("RGB")


def caption(mosaic: Mosaic) -> str:
    """What is where, in words: `"top left coat, top right nothing, bottom left bag, bottom right coat"`."""
    return ", ".join(f"{place} {_word(label)}" for place, label in zip(PLACES, mosaic.labels, strict=True))


def _word(label: int | None) -> str:
    return "nothing" if label is None else WORDS[label]
