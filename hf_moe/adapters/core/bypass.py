"""The base model without some of its adapters, without PEFT noticing."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layer import CellLayer


__all__ = ["bypass"]


@contextmanager
def bypass(model: nn.Module, layer_class: type[CellLayer] = CellLayer) -> Iterator[None]:
    """The model without the adapters of one type while the block runs, bit for bit.

    Unlike PEFT's `disable_adapter`, it leaves other types on and `requires_grad` as it is, so it may run between a
    forward pass and its backward pass.

    Args:
        model (`nn.Module`): A model, with or without adapters.
        layer_class (`type`, defaults to [`CellLayer`]): Layers of which type are off.
    """
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
