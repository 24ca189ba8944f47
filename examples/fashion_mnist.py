"""Fashion-MNIST from a local folder or from the Hub: 70 000 grey pictures of clothes, 28 x 28, ten classes.

    python examples/fashion_mnist.py --data /usr/share/datasets/fashion-mnist

The four files of the original distribution (`train-images-idx3-ubyte` and so on, packed with gzip or not) are what the
Debian package `dataset-fashion-mnist` installs under `/usr/share/datasets`. Without a folder the data come from
`zalando-datasets/fashion_mnist` on the Hub, by way of the datasets library.
"""

import argparse
import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


CLASSES = (
    "T-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
HUB = "zalando-datasets/fashion_mnist"
_WHERE = (
    f"Leave the folder out to take the data from {HUB!r} on the Hub, or install the Debian package "
    "`dataset-fashion-mnist`, which puts the files under /usr/share/datasets/fashion-mnist."
)


class Pictures(NamedTuple):
    """The data; shapes: N = 60 000 to train with, M = 10 000 to test with (fewer in a folder of your own)."""

    train_images: np.ndarray  # (N, 28, 28) uint8, 0 is background
    train_labels: np.ndarray  # (N,) uint8
    test_images: np.ndarray  # (M, 28, 28) uint8
    test_labels: np.ndarray  # (M,) uint8


def load(folder: str | Path | None = None) -> Pictures:
    """Reads Fashion-MNIST.

    Args:
        folder (`str` or `Path`, *optional*): Where the four idx files are. Taken from the Hub if left out.

    Returns:
        [`Pictures`]

    Raises:
        FileNotFoundError: The folder lacks one of the files.
        ValueError: A file is no such idx file, is cut off, or does not fit the others.

    Example:
        ```python
        data = load("/usr/share/datasets/fashion-mnist")
        CLASSES[data.train_labels[0]]  # "ankle boot"
        ```
    """
    if folder is None:
        return _from_hub()
    folder = Path(folder)
    parts = []
    for split in ("train", "t10k"):
        images = _read(folder, f"{split}-images-idx3-ubyte", 3)
        labels = _read(folder, f"{split}-labels-idx1-ubyte", 1)
        _check(images, labels, f"{folder} ({split})")
        parts += [images, labels]
    return Pictures(*parts)


def _read(folder: Path, name: str, dimensions: int) -> np.ndarray:
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has neither {name}.gz nor {name}. {_WHERE}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. {_WHERE}") from error
    header = 4 + 4 * dimensions
    # idx: two zero bytes, 8 for unsigned bytes, the number of dimensions; each dimension as a big-endian integer
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path} is no idx file of unsigned bytes with {dimensions} dimension(s). {_WHERE}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - header != int(np.prod(shape)):
        raise ValueError(f"{path} should hold {shape} values, but has {len(content) - header} bytes. {_WHERE}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _check(images: np.ndarray, labels: np.ndarray, where: str) -> None:
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{where} is not Fashion-MNIST: pictures of shape {images.shape}, labels {labels.shape}; expected "
            f"(N, 28, 28) and (N,). {_WHERE}"
        )
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{where} is not Fashion-MNIST: label {labels.max()}, expected 0 to 9. {_WHERE}")


def _from_hub() -> Pictures:
    from datasets import load_dataset

    parts = []
    for split in ("train", "test"):
        table = load_dataset(HUB, split=split)
        images = np.stack([np.asarray(picture, dtype=np.uint8) for picture in table["image"]])
        labels = np.asarray(table["label"], dtype=np.uint8)
        _check(images, labels, f"{HUB} ({split})")
        parts += [images, labels]
    return Pictures(*parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Say what is in a folder with Fashion-MNIST.")
    parser.add_argument("--data", help="Folder with the idx files; from the Hub if left out.")
    data = load(parser.parse_args(arguments).data)
    for split, labels in (("train", data.train_labels), ("test", data.test_labels)):
        counts = np.bincount(labels, minlength=len(CLASSES))
        print(f"{split}: {len(labels)} pictures")
        for name, count in zip(CLASSES, counts, strict=True):
            print(f"  {name:14s} {count}")


if __name__ == "__main__":
    main()
