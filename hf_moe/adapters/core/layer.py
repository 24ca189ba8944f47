"""A base module with cells beside it: what stands in the model where a target module stood."""

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .runtime import Runtime


__all__ = ["BlockLayer", "CellLayer"]


class CellLayer(nn.Module, BaseTunerLayer):
    """A target module and, for each adapter, one cell in some of the type's containers.

    A type sets `prefix` and `containers` (one per group of weights that trains or freezes together), and overrides
    [`~CellLayer.build`] and [`~CellLayer.adapt`]; where its effect is an addition to the base's weight it overrides
    [`~CellLayer.delta_weight`] too, and merging works.

    Args:
        base_layer (`nn.Module`): The module that is adapted.
        runtime ([`Runtime`], *optional*): Conditions of the running call.
        name (`str`, *optional*): Path of the module in the model.
    """

    prefix: ClassVar[str]
    containers: ClassVar[tuple[str, ...]] = ("cell",)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "prefix"):
            cls.adapter_layer_names = tuple(cls.prefix + container for container in cls.containers)

    def __init__(self, base_layer: nn.Module, runtime: Runtime | None = None, name: str = ""):
        super().__init__()
        self.base_layer = base_layer
        self.runtime = runtime
        self.name = name
        for size in ("in_features", "out_features"):  # other code asks a wrapped Linear for them
            if hasattr(base_layer, size):
                setattr(self, size, getattr(base_layer, size))
        for container in self.adapter_layer_names:
            setattr(self, container, nn.ModuleDict())
        # On the instance: PEFT's class defaults are one list and one dict for all layers.
        self.merged_adapters = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False

    def build(self, adapter_name: str, config: Any) -> dict[str, nn.Module]:
        """Makes the cells of a new adapter.

        Args:
            adapter_name (`str`): Its name.
            config ([`MoeAdapterConfig`]): Its config.

        Returns:
            `dict[str, nn.Module]`: By container; containers this layer has nothing for are left out.
        """
        raise TypeError(f"{type(self).__name__} must override `build`.")

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The adapted output.

        Args:
            adapter_name (`str`): Which adapter.
            x (`torch.Tensor`): The base module's (first) input, in the dtype of the cells.
            output (`torch.Tensor`): The base module's (first) output, in the dtype of the cells.

        Returns:
            `torch.Tensor`: In place of `output`.
        """
        raise TypeError(f"{type(self).__name__} must override `adapt`.")

    def cell(self, container: str, adapter_name: str) -> Any:
        """The adapter's cell in a container (named without prefix), or `None`."""
        cells = getattr(self, self.prefix + container)
        return cells[adapter_name] if adapter_name in cells else None

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter has a cell here."""
        return any(adapter_name in getattr(self, container) for container in self.adapter_layer_names)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Adds an adapter.

        Args:
            adapter_name (`str`): Its name.
            config ([`MoeAdapterConfig`]): Its config.
        """
        for container, cell in self.build(adapter_name, config).items():
            getattr(self, self.prefix + container)[adapter_name] = cell
            cell.train(self.base_layer.training)  # added to a model in eval mode, it must not act as in training
        self.freeze(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def freeze(self, adapter_name: str, config: Any) -> None:
        """Notes which containers do not train; PEFT applies it whenever it sets `requires_grad`."""
        self.frozen_peft_weight_names[adapter_name] = tuple(self.prefix + name for name in config.frozen_containers())

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base module, then the active adapters one after another.

        Args:
            *args: For the base module; the first one (or the keyword `hidden_states`) is what cells read.
            adapter_names (`list[str]`, *optional*): One adapter (or `"__base__"`) per row of the batch.
            **kwargs: For the base module.

        Returns:
            As the base module; of a tuple only the first element is adapted.
        """
        if adapter_names is not None:
            return self._mixed_batch(adapter_names, args, kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        x = _first_input(args, kwargs)
        output, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        for adapter_name in self.active_adapters:
            if self.has(adapter_name):
                output = self._adapt(adapter_name, x, output)
        return output if rest is None else (output, *rest)

    def _adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.runtime is not None:
            self.runtime.check_recomputation()
        dtype = self._cell_dtype(adapter_name)
        if dtype is None:
            return self.adapt(adapter_name, x, output)
        return self.adapt(adapter_name, self._cast_input_dtype(x, dtype), output.to(dtype)).to(output.dtype)

    def _cell_dtype(self, adapter_name: str) -> torch.dtype | None:
        for container in self.adapter_layer_names:
            cells = getattr(self, container)
            if adapter_name in cells:
                for parameter in cells[adapter_name].parameters():
                    if parameter.is_floating_point():
                        return parameter.dtype
        return None

    def _mixed_batch(self, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        x = _first_input(args, kwargs)
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return result
        output, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        for adapter_name in dict.fromkeys(adapter_names):
            if adapter_name == "__base__" or not self.has(adapter_name):
                continue
            index = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=x.device)
            if self.runtime is None:
                adapted = self._adapt(adapter_name, x[index], output[index])
            else:
                with self.runtime.rows(index, len(adapter_names)):
                    adapted = self._adapt(adapter_name, x[index], output[index])
            output = output.index_copy(0, index, adapted)
        return output if rest is None else (output, *rest)

    def delta_weight(self, adapter_name: str) -> torch.Tensor | None:
        """What merging adds to the base's weight, as `(out, in)`, or `None` where the effect is no such addition."""
        return None

    def merge_refusal(self, adapter_name: str) -> str | None:
        """Why an adapter cannot be merged, or `None` if it can."""
        if self.delta_weight(adapter_name) is None:
            return "its effect depends on the input, so no change of the base's weights can replace it"
        if not self._merge_target().is_floating_point():
            return "the base's weights are quantised"
        return None

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """As [`~CellLayer.delta_weight`], in the layout and dtype of the base's weight. PEFT's name for it."""
        delta = self.delta_weight(adapter_name)
        if delta is None:
            raise ValueError(f"{type(self).__name__} adds nothing to a weight.")
        if isinstance(self.get_base_layer(), Conv1D):
            delta = delta.T
        return delta.to(self._merge_target().dtype)

    def _merge_target(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base's weight.

        Args:
            safe_merge (`bool`, defaults to `False`): Look for NaN first, and leave everything as it is if there is.
            adapter_names (`list[str]`, *optional*): Which; the active ones if left out.

        Raises:
            NotImplementedError: An adapter's effect cannot be written into weights.
            ValueError: `safe_merge` found a value that is not finite.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if not self.has(adapter_name):
                continue
            refusal = self.merge_refusal(adapter_name)
            if refusal is not None:
                raise NotImplementedError(f"Adapter {adapter_name!r} cannot be merged: {refusal}. Use `unload()`.")
            weight = self._merge_target()
            merged = weight.data + self.get_delta_weight(adapter_name)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
            weight.data.copy_(merged)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Takes merged adapters out of the base's weight again."""
        while self.merged_adapters:
            self._merge_target().data.sub_(self.get_delta_weight(self.merged_adapters.pop()))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:  # a block: no `weight` of its own
            for parameter in base_layer.parameters():
                if parameter.is_floating_point():
                    return parameter.device, parameter.dtype
        return device, dtype


class BlockLayer(CellLayer):
    """A cell layer around a block (attention, feed-forward) whose attributes other code reads."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet, or no longer
                raise
            return getattr(super().__getattr__("base_layer"), name)


def _first_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next(value for value in kwargs.values() if isinstance(value, torch.Tensor))
