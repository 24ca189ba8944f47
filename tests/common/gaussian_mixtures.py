"""The truths of the papers on softmax-gated Gaussian mixtures of experts, and data drawn from them."""

import torch

from hf_moe.statistics import GaussianMoEParameters


__all__ = ["TEMPERED", "TWO_LINES", "draw"]

#: 2309.13850 and 2305.03288: two steep lines that cross.
TWO_LINES = GaussianMoEParameters([[25.0], [0.0]], [-8.0, 0.0], [[-20.0], [20.0]], [15.0, -5.0], [0.3, 0.4])
#: With a temperature, for 2401.13875.
TEMPERED = GaussianMoEParameters([[2.0], [0.0]], [0.5, 0.0], [[2.0], [-2.0]], [1.0, -1.0], [0.5, 0.6], 0.8)


def draw(parameters, size, low=0.0, high=1.0, seed=0, **gate):
    """x `(n, d)` uniform, and y `(n,)`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, parameters.input_size)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return x, parameters.to_model(**gate).sample(x, generator)
