"""Pictures of Fashion-MNIST two at a time on a canvas, with captions: data for a small CLIP.

    a large dark coat top left and a small bag bottom right

A canvas of 56 x 56 has four places, two of them taken. What a picture shows is its label; whether it is bright or
dark, large or small is computed from its pixels: the mean brightness of what is not background, and how much of the
picture that is, each against the median of the class. A caption names one picture or both, and each adjective or not.
"""

from typing import Any, NamedTuple

import numpy as np
import torch


WORDS = ("tee", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZES, SHADES = ("small", "large"), ("dark", "bright")
SIDE, IMAGE_SIZE, PATCH_SIZE = 28, 56, 14
#: Ids of padding, of a caption's begin and of its end, which CLIP looks for.
VOCABULARY = ("<pad>", "<begin>", "a", "and", *SIZES, *SHADES, *WORDS, "top", "bottom", "left", "right", "<end>")


class Pictures(NamedTuple):
    """Single pictures and what can be said of them; N pictures."""

    images: np.ndarray  # (N, 28, 28) uint8, 0 is background
    classes: np.ndarray  # (N,)
    sizes: np.ndarray  # (N,), index into SIZES
    shades: np.ndarray  # (N,), index into SHADES


def describe(images: np.ndarray, classes: np.ndarray) -> Pictures:
    """Size and shade of each picture, against the median of its class."""
    area = (images > 0).sum((1, 2))
    brightness = images.sum((1, 2)) / np.maximum(area, 1)
    sizes, shades = np.zeros(len(images), int), np.zeros(len(images), int)
    for one in np.unique(classes):
        members = classes == one
        sizes[members] = area[members] > np.median(area[members])
        shades[members] = brightness[members] > np.median(brightness[members])
    return Pictures(images, classes.astype(int), sizes, shades)


class Canvases:
    """A dataset of canvases with one caption each; rows are `{"row": number}`, [`collate`] makes a batch of them.

    Args:
        pictures ([`Pictures`]): Where the two of a canvas are drawn from.
        count (`int`): Canvases.
        seed (`int`): Decides them and their captions.
        full (`bool`): Captions that say everything, no two the same, as retrieval needs them.
    """

    def __init__(self, pictures: Pictures, count: int, seed: int, full: bool = False):
        random, self.pictures = np.random.default_rng(seed), pictures
        drawn = 4 * count if full else count
        self.index = random.integers(len(pictures.images), size=(drawn, 2))
        self.places = np.sort(np.argsort(random.random((drawn, 4)), axis=1)[:, :2], axis=1)  # in reading order
        self.captions = [self._caption(row, random, full) for row in range(drawn)]
        if full:
            kept = list({caption: row for row, caption in enumerate(self.captions)}.values())[:count]
            self.index, self.places = self.index[kept], self.places[kept]
            self.captions = [self.captions[row] for row in kept]
        self.tokens = encode(self.captions)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"row": row}

    def _caption(self, row: int, random: np.random.Generator, full: bool) -> str:
        named = [0, 1] if full or random.random() < 0.75 else [int(random.integers(2))]
        parts = []
        for one in named:
            picture = self.index[row, one]
            says = [full or random.random() < 0.6 for _ in range(2)]
            size = SIZES[self.pictures.sizes[picture]] if says[0] else ""
            shade = SHADES[self.pictures.shades[picture]] if says[1] else ""
            name, place = WORDS[self.pictures.classes[picture]], PLACES[self.places[row, one]]
            parts.append(" ".join(word for word in ("a", size, shade, name, place) if word))
        return " and ".join(parts)

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """Canvases `(B, 56, 56)` uint8."""
        canvas = np.zeros((len(rows), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        for one in range(2):
            for place in range(4):
                here = self.places[rows, one] == place
                down, across = (SIDE * step for step in divmod(place, 2))
                part = self.pictures.images[self.index[rows[here], one]]
                canvas[here, down : down + SIDE, across : across + SIDE] = part
        return canvas

    def collate(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        """Rows to a batch: `pixel_values` of shape `(B, 3, 56, 56)` from -1 to 1, `input_ids`, `attention_mask`."""
        numbers = np.array([row["row"] for row in rows])
        pixels = torch.from_numpy(self.draw(numbers)).float() / 127.5 - 1
        ids = self.tokens[torch.from_numpy(numbers)]
        return {
            "pixel_values": pixels[:, None].expand(-1, 3, -1, -1),
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
        }

    def attributes(self) -> dict[str, np.ndarray]:
        """What clusters could be about; each `(P,)` of whole numbers."""
        classes, sizes, shades = (
            part[self.index] for part in (self.pictures.classes, self.pictures.sizes, self.pictures.shades)
        )
        return {
            "places": 4 * self.places[:, 0] + self.places[:, 1],
            "class of the first": classes[:, 0],
            "class of the second": classes[:, 1],
            "bright ones": shades.sum(1),
            "large ones": sizes.sum(1),
            "pictures named": np.array([caption.count(" and ") for caption in self.captions]),
        }


def encode(captions: list[str]) -> torch.Tensor:
    """Ids `(P, 15)` with begin and end, padded on the right."""
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    rows = [[ids["<begin>"], *(ids[word] for word in caption.split()), ids["<end>"]] for caption in captions]
    return torch.tensor([row + [0] * (15 - len(row)) for row in rows])


def questions(canvases: Canvases, what: str) -> list[tuple[np.ndarray, list[str], torch.Tensor]]:
    """Zero-shot questions about the first picture of each canvas.

    Args:
        canvases ([`Canvases`]): Canvases.
        what (`str`): `"class"` (ten answers), `"size"` or `"shade"` (two answers each, the class is given).

    Returns:
        `list`: Rows with the same candidates, the candidates, and which is right for each row.
    """
    first, place = canvases.index[:, 0], canvases.places[:, 0]
    classes = canvases.pictures.classes[first]
    found = []
    for where in np.unique(place):
        if what == "class":
            rows = np.flatnonzero(place == where)
            found.append((rows, [f"a {word} {PLACES[where]}" for word in WORDS], torch.from_numpy(classes[rows])))
            continue
        words, of_picture = {
            "size": (SIZES, canvases.pictures.sizes),
            "shade": (SHADES, canvases.pictures.shades),
        }[what]
        for one in np.unique(classes[place == where]):
            rows = np.flatnonzero((place == where) & (classes == one))
            texts = [f"a {word} {WORDS[one]} {PLACES[where]}" for word in words]
            found.append((rows, texts, torch.from_numpy(of_picture[first[rows]])))
    return found


def make_processor() -> Any:
    """The same words and pixels for `pipeline` and whoever else takes a processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, CLIPProcessor, PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[(word, ids[word]) for word in ("<begin>", "<end>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<begin>", eos_token="<end>", model_max_length=15
    )
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=half,
        image_std=half,
    )
    return CLIPProcessor(images, tokenizer)
