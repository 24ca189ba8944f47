"""An attention block and, beside it, the cells that stand for guidance."""

from typing import Any

import torch
from torch import nn

from hf_moe.adapters.core import BlockLayer, Runtime

from .cells import CrossAttentionCell, OffsetCell
from .conditions import Conditions
from .sites import block_sizes


__all__ = ["AgdLayer"]

# diffusers looks for modules that have these and would count a wrapped attention twice.
_OF_THE_BLOCK_ONLY = ("get_processor", "set_processor")


class AgdLayer(BlockLayer):
    """`block_out <- block_out + A(block_in; w, t, c)`; of a tuple (joint attention) only the first element.

    Args:
        base_layer (`nn.Module`): The attention block.
        runtime ([`Runtime`]): Conditions of the running call.
        name (`str`): Path of the block in the model.
        conditions ([`Conditions`]): What watches the base model.
    """

    prefix = "hfmoe_agd_"

    def __init__(self, base_layer: nn.Module, runtime: Runtime | None, name: str, conditions: Conditions):
        super().__init__(base_layer, runtime, name)
        self.conditions = conditions

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_BLOCK_ONLY:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; its block has: `base_layer.{name}`.")
        return super().__getattr__(name)

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        """See [`CellLayer.build`]."""
        cell = OffsetCell if config.architecture == "offset" else CrossAttentionCell
        return {"cell": cell(config, *block_sizes(self.get_base_layer(), config, self.name))}

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """See [`CellLayer.adapt`]."""
        cell = self.cell("cell", adapter_name)
        if x.ndim not in (2, 3):
            raise ValueError(f"The input of {self.name!r} has shape {tuple(x.shape)}; needed is (B, S, d) or (B, d).")
        scale = self.conditions.scale(x.device)
        self.conditions.check_range(scale, cell.range)
        if len(scale) not in (1, len(x)):
            raise ValueError(f"`agd_scale` has {len(scale)} values for a batch of {len(x)}.")
        # One scale is encoded once per row, so that it gives the same bits as a scale for each row.
        return output + cell(x, scale.expand(len(x)), self.conditions.of(cell, x))
