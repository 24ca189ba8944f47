"""A module with sparse adapters beside it."""

import zlib
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_moe.adapters.core import BlockLayer, Bottleneck, ParameterLayer, Runtime

from .cells import LowRank, SplitBottleneck, SplitLowRank
from .config import MosaConfig
from .hosts import width
from .stream import ResidualStream


__all__ = ["MosaLayer", "ParamWrapper"]


class MosaLayer(BlockLayer):
    """The module with, for each adapter, a bottleneck or a low-rank product, split or plain.

    Args:
        base_layer (`nn.Module`): A linear layer or a block.
        runtime ([`~hf_moe.adapters.core.Runtime`], *optional*): Not used: the type needs no conditions.
        name (`str`, *optional*): Path of the module in the model.
        hidden_size (`int`, *optional*): Of the model, for blocks whose width cannot be told otherwise.
    """

    prefix = "hfmoe_mosa_"

    def __init__(
        self, base_layer: nn.Module, runtime: Runtime | None = None, name: str = "", hidden_size: int | None = None
    ):
        super().__init__(base_layer, runtime, name)
        self.hidden_size = hidden_size
        self._styles: dict[str, MosaConfig] = {}

    def build(self, adapter_name: str, config: MosaConfig) -> dict[str, nn.Module]:
        """Makes the adapter's cell."""
        base = self.get_base_layer()
        if config.style == "lora":
            if not isinstance(base, (nn.Linear, Conv1D)):
                raise ValueError(
                    f"`style='lora'` adapts linear layers, but {self.name!r} is a {type(base).__name__}. Name linear "
                    "layers in `target_modules`, or use another style."
                )
            in_features, out_features = width(base, None)
            cell = self._low_rank((out_features, in_features), config)
        else:
            in_features, out_features = width(base, self.hidden_size)
            if config.style != "parallel":
                in_features = out_features
            elif config.adapter_input == "residual":
                in_features = out_features  # the stream that the output is added to
            cell = self._bottleneck(in_features, out_features, config)
        self._styles[adapter_name] = config
        return {"cell": cell}

    def _bottleneck(self, in_features: int, out_features: int, config: MosaConfig) -> nn.Module:
        settings: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "rank": config.r,
            "activation": config.activation,
            "bias": config.adapter_bias,
            "dropout": config.dropout,
            "layernorm": config.layernorm,
            "scale": config.scale,
            "init_weights": config.init_weights,
        }
        return SplitBottleneck(**settings, **self._split(config)) if config.num_experts > 1 else Bottleneck(**settings)

    def _low_rank(self, shape: tuple[int, ...], config: MosaConfig) -> nn.Module:
        settings: dict[str, Any] = {
            "shape": shape,
            "rank": config.r,
            "dropout": config.dropout,
            "scale": config.scale,
            "init_weights": config.init_weights,
        }
        return SplitLowRank(**settings, **self._split(config)) if config.num_experts > 1 else LowRank(**settings)

    def _split(self, config: MosaConfig) -> dict[str, Any]:
        # The path makes the partitions of the model's adapters differ, and stays the same however it is loaded.
        seed = config.mask_seed + 2 * zlib.crc32(self.name.encode())
        return {
            "num_experts": config.num_experts,
            "share": config.share,
            "seed": seed,
            "merge_scale": config.merge_scale,
        }

    def listen(self, source: nn.Module) -> None:
        """Lets adapters of this layer read what `source` was called with, earlier in the same call of the model.

        Args:
            source (`nn.Module`): The norm before the block.
        """
        if self._stream is None:
            self.runtime = ResidualStream(source, self.name)

    def stop_listening(self) -> None:
        """Takes the hook off again."""
        if self._stream is not None:
            self._stream.remove()
            self.runtime = None

    @property
    def _stream(self) -> ResidualStream | None:
        return self.runtime if isinstance(self.runtime, ResidualStream) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As [`~hf_moe.adapters.core.CellLayer.forward`]."""
        result = super().forward(*args, **kwargs)
        if self._stream is not None:
            self._stream.clear()
        return result

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Adds the adapter's result to the module's output."""
        config = self._styles[adapter_name]
        if config.style in ("pfeiffer", "houlsby"):
            x = output
        elif config.adapter_input == "residual" and self._stream is not None:
            x = self._stream.read().to(output.dtype)
        return output + self.cell("cell", adapter_name)(x)

    def delta_weight(self, adapter_name: str) -> torch.Tensor | None:
        """The merged product of an adapter in LoRA form; `None` for a bottleneck."""
        cell = self.cell("cell", adapter_name)
        return cell.delta() if isinstance(cell, LowRank) else None

    def merge_refusal(self, adapter_name: str) -> str | None:
        """As [`~hf_moe.adapters.core.CellLayer.merge_refusal`]; a bottleneck can only be collapsed."""
        if not isinstance(self.cell("cell", adapter_name), LowRank):
            return (
                "a bottleneck is not linear, so no change of the base's weights can replace it; "
                "`collapse_adapter` makes it one plain adapter"
            )
        return super().merge_refusal(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can turn the adapter into LoRA: in LoRA form."""
        return isinstance(self.cell("cell", adapter_name), LowRank) and not isinstance(self, ParameterLayer)

    def collapse(self, adapter_name: str) -> None:
        """Puts the plain adapter that it is in evaluation in the place of the split one."""
        cell = self.cell("cell", adapter_name)
        if isinstance(cell, (SplitBottleneck, SplitLowRank)):
            getattr(self, self.prefix + "cell")[adapter_name] = cell.collapse()


class ParamWrapper(ParameterLayer, MosaLayer):
    """A parameter, such as the stacked weights of experts, with sparse low-rank additions; PEFT knows it by this name.

    The additions are (E, O, R) times (E, R, I) for E experts; a MoSA expert is a part of all of them.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, name: str = ""):
        self.parameter_name = parameter_name
        MosaLayer.__init__(self, base_layer, None, name)

    def build(self, adapter_name: str, config: MosaConfig) -> dict[str, nn.Module]:
        """Makes the adapter's cell."""
        shape = tuple(self.get_param().shape)
        if len(shape) < 2:
            raise ValueError(f"`target_parameters` must have at least two dimensions, but {self.name!r} has {shape}.")
        if self._is_transposed():
            shape = (*shape[:-2], shape[-1], shape[-2])
        return {"cell": self._low_rank(shape, config)}

    def _is_transposed(self) -> bool:
        # gpt-oss keeps its experts' weights as (E, I, O)
        return self.get_param().ndim == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    def delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The merged product, in the layout of the parameter."""
        return self._delta(adapter_name, merged=True)

    def current_delta(self, adapter_name: str) -> torch.Tensor:
        """What this call adds to the parameter: in training, of an expert that is drawn."""
        return self._delta(adapter_name, merged=False).to(self.get_param().dtype)

    def _delta(self, adapter_name: str, merged: bool) -> torch.Tensor:
        delta = self.cell("cell", adapter_name).delta(merged)
        return delta.transpose(-1, -2) if self._is_transposed() else delta

    forward = ParameterLayer.forward
    adapt = ParameterLayer.adapt
    merge_refusal = BlockLayer.merge_refusal
