"""The example's modules, and a tiny Fashion-MNIST of noise."""

import importlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest


FOLDER = Path(__file__).parents[3] / "examples"
MODULES = ("mosaics", "questions", "data", "tower", "settings", "models", "scoring", "figures", "stages")


@pytest.fixture(scope="module")
def example():
    """The modules by name, `run` among them; gone afterwards, for other examples have modules of the same names."""
    names = ("fashion_mnist", *MODULES, "run")
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    paths = [str(FOLDER / "llava_mosaics"), str(FOLDER)]
    sys.path[:0] = paths
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)
    for path in paths:
        while path in sys.path:
            sys.path.remove(path)
    sys.modules.update(hidden)


@pytest.fixture
def toy(tmp_path):
    """A folder with the four files of Fashion-MNIST, of noise."""
    draw = np.random.default_rng(0)

    def idx(values):
        return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()

    for split, count in (("train", 80), ("t10k", 40)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path
