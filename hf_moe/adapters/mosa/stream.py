"""What a block's adapter reads besides the block's own input: the residual stream before the norm."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_moe.adapters.core import Runtime


__all__ = ["ResidualStream"]


class ResidualStream(Runtime):
    """The input of a module that runs earlier in the same layer, kept until the adapted block has run.

    It stands where the core has the conditions of a call, which tells it the rows of mixed batches. Since it is filled
    inside the layer, the repetition of gradient checkpointing fills it again.

    Args:
        source (`nn.Module`): The module, usually a norm.
        reader (`str`): Path of the adapted block, for messages.
    """

    def __init__(self, source: nn.Module, reader: str):
        super().__init__()
        self.source = type(source).__name__
        self.reader = reader
        self.value: torch.Tensor | None = None
        self.selected: torch.Tensor | None = None
        self.handle = source.register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook on the module."""
        self.value = args[0] if args else next(iter(kwargs.values()))

    def read(self) -> torch.Tensor:
        """The stream.

        Returns:
            `torch.Tensor`: As the module got it; inside a mixed batch only the rows of the adapter that asks.

        Raises:
            RuntimeError: The module has not run in this call.
        """
        if self.value is None:
            raise RuntimeError(
                f"The adapter of {self.reader!r} reads the residual stream (`adapter_input='residual'`), but the "
                f"{self.source} before it has not run in this call. Call the model, not its block."
            )
        return self.value if self.selected is None else self.value[self.selected]

    @contextmanager
    def rows(self, index: torch.Tensor, batch: int) -> Iterator[None]:
        """Inside, [`~ResidualStream.read`] gives only the rows `index`."""
        self.selected = index
        try:
            yield
        finally:
            self.selected = None

    def check_recomputation(self) -> None:
        """Nothing to check."""

    def clear(self) -> None:
        """Forgets the activations."""
        self.value = None

    def remove(self) -> None:
        """Takes the hook off."""
        self.handle.remove()
        self.clear()
