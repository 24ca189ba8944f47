"""Buffers that stay float32 when a module is cast to a lower precision."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


__all__ = ["Float32Buffers"]


class Float32Buffers(nn.Module):
    """A module some of whose buffers move with it but never lose precision.

    A threshold or a frequency rounded to bfloat16 is another threshold or frequency; the adapter of a bfloat16 model
    is cast when it is made. A subclass names them in `float32_buffers`.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            kept = buffer.to(moved.device) if moved.device.type != "meta" and buffer.device.type != "meta" else moved
            setattr(self, name, kept if kept.dtype == torch.float32 else kept.float())
        return self
