"""Noise in the files of Fashion-MNIST, for examples that read them."""

import struct

import numpy as np


__all__ = ["write_toy_pictures"]


def write_toy_pictures(folder):
    """Writes 64 training and 40 test pictures of noise with labels 0 to 9 in turn; returns the folder."""
    draw = np.random.default_rng(0)

    def idx(values):
        return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()

    for split, count in (("train", 64), ("t10k", 40)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return folder
