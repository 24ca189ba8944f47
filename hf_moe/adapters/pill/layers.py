"""The three leaf modules of a transformer layer with PILL's cells beside them.

Shapes: B batch, S sequence, D hidden, H key-value heads, P size of a head.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from hf_moe.adapters.core import CellLayer, Runtime

from .cells import HeadGate, improved_adapter
from .config import SHARED
from .modality import modality_map, rows_by_modality


__all__ = ["AttentionNormLayer", "FeedForwardNormLayer", "PillLayer", "ValueLayer"]


class PillLayer(CellLayer):
    """What the three layers share: containers, and access to the adapter's config and the call's modalities.

    Args:
        base_layer (`nn.Module`): A norm or a value projection.
        runtime ([`~hf_moe.adapters.core.Runtime`], *optional*): Conditions of the running call.
        name (`str`, *optional*): Path of the module in the model.
        width (`int`, *optional*): D.
        heads (`int`, *optional*): H.
        last (`bool`, *optional*): Whether this is the model's last layer.
    """

    prefix: ClassVar[str] = "hfmoe_pill_"
    containers: ClassVar[tuple[str, ...]] = ("attn", "text", "modality", "gate")

    def __init__(
        self,
        base_layer: nn.Module,
        runtime: Runtime | None = None,
        name: str = "",
        *,
        width: int = 0,
        heads: int = 0,
        last: bool = False,
    ):
        super().__init__(base_layer, runtime, name)
        self.width = width
        self.heads = heads
        self.last = last
        self.configs: dict[str, Any] = {}

    def freeze(self, adapter_name: str, config: Any) -> None:
        """Notes the config, whose stage decides what trains and whether gates are passed by."""
        self.configs[adapter_name] = config
        super().freeze(adapter_name, config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter."""
        self.configs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def modality(self, adapter_name: str, states: torch.Tensor) -> torch.Tensor | None:
        """Numbers of the modalities `(B, S)` of `states` `(B, S, D)`, or `None` when all are of the first one."""
        assert self.runtime is not None
        if states.ndim != 3:
            raise ValueError(
                f"PILL needs hidden states of shape (batch, sequence, hidden), but the output of {self.name!r} has "
                f"the shape {tuple(states.shape)}: modalities cannot be told from it."
            )
        batch, length, _ = states.shape
        return modality_map(self.runtime, adapter_name, self.configs[adapter_name], batch, length, states.device)


class AttentionNormLayer(PillLayer):
    """x_n + A_attn(x_n), with x_n the norm's output: what attention reads."""

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        """One adapter for all tokens."""
        return {"attn": improved_adapter(self.width, config.r, config.init_weights)}

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The adapter added to the norm's output."""
        return output + self.cell("attn", adapter_name)(output)


class FeedForwardNormLayer(PillLayer):
    """h_n + A_m(h_n), with h_n the norm's output and A_m the adapter of the token's modality m."""

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        """One adapter per modality, the first one in a container of its own; or a single one for all."""

        def cell() -> nn.Module:
            return improved_adapter(self.width, config.r, config.init_weights)

        if not config.modality_experts:
            return {"modality": nn.ModuleDict({SHARED: cell()})}
        others = nn.ModuleDict({name: cell() for name in config.modalities[1:]})
        return {"text": cell(), "modality": others}

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Each token with its modality's adapter. An adapter without tokens gets zero gradients, not none."""
        config = self.configs[adapter_name]
        others = list(self.cell("modality", adapter_name).values())
        if not config.modality_experts:
            return output + others[0](output)
        experts = [self.cell("text", adapter_name), *others]
        if config.last_layer_invert and config.stage == "align" and self.last:
            experts.reverse()
        modality = self.modality(adapter_name, output)
        if modality is None:
            return output + experts[0](output)
        if torch.compiler.is_compiling():  # how many tokens there are of a kind would break the graph
            added = experts[0](output)
            for index, expert in enumerate(experts[1:], start=1):
                added = torch.where((modality == index).unsqueeze(-1), expert(output), added)
            return output + added
        assert self.runtime is not None
        flat = output.reshape(-1, output.shape[-1])  # (B * S, D)
        result = flat
        for rows, expert in zip(
            rows_by_modality(self.runtime, adapter_name, modality, len(experts)), experts, strict=True
        ):
            if len(rows) == len(flat):
                result = result + expert(flat)
            elif len(rows) or torch.is_grad_enabled():
                result = result.index_add(0, rows, expert(flat[rows]).to(result.dtype))
        return result.reshape(output.shape)


class ValueLayer(PillLayer):
    """The values of gated modalities' tokens times tanh(W_g x), per head; keys are untouched."""

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        """One gate per key-value head; as many as there are heads in the paper's multi-head attention."""
        return {"gate": HeadGate(self.width, self.heads, config.init_weights)}

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The gated values; unscaled while aligning."""
        config = self.configs[adapter_name]
        if config.stage == "align":
            return output
        modality = self.modality(adapter_name, output)
        if modality is None:
            return output
        gated = torch.zeros_like(modality, dtype=torch.bool)
        for index in config.gated:
            gated = gated | (modality == index)
        gate = self.cell("gate", adapter_name)(x).to(output.dtype)  # (B, S, H)
        factor = torch.where(gated.unsqueeze(-1), gate, 1.0)
        return (output.unflatten(-1, (self.heads, -1)) * factor.unsqueeze(-1)).flatten(-2)  # (B, S, H * P)
