"""Evaluation mode for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


__all__ = ["eval_mode"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[Any]:
    """Has the model in eval mode while the block runs; afterwards every module is in the mode it was in.

    Args:
        model (`nn.Module`): Some of its modules may be in one mode and some in the other.

    Yields:
        `nn.Module`: The model.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True
