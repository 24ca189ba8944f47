"""A parameter that is no module's weight, adapted: stacked experts and routers."""

from typing import Any

import torch
from torch import nn

from .layer import CellLayer
from .runtime import Runtime


__all__ = ["ParameterLayer"]


class ParameterLayer(CellLayer):
    """A module one of whose parameters the adapters add to.

    PEFT recognises such layers by the class name `ParamWrapper`, which a type's subclass must have. For two parameters
    of one module it nests one layer in another. A subclass overrides `build` and `delta_weight` (same shape as the
    parameter).

    Args:
        base_layer (`nn.Module`): The module that holds the parameter, or a layer like this around it.
        parameter_name (`str`): Its name, such as `"gate_up_proj"`.
        runtime ([`Runtime`], *optional*): Conditions of the running call.
        name (`str`, *optional*): Path of the parameter in the model.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, runtime: Runtime | None = None, name: str = ""):
        self.parameter_name = parameter_name
        super().__init__(base_layer, runtime, name)

    def get_param(self) -> torch.Tensor:
        """The base's parameter, without any adapter."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _merge_target(self) -> torch.Tensor:
        return self.get_param()

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What merging adds to the parameter, in its dtype."""
        delta = self.delta_weight(adapter_name)
        if delta is None:
            raise ValueError(f"{type(self).__name__} adds nothing to a parameter.")
        return delta.to(self.get_param().dtype)

    def current_delta(self, adapter_name: str) -> torch.Tensor:
        """What the running call adds to the parameter: what merging adds, unless a type trains with something else."""
        return self.get_delta_weight(adapter_name)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base module with the adapted parameter.

        Args:
            *args: For the base module.
            adapter_names (`list[str]`, *optional*): Not possible here; see the error.
            **kwargs: For the base module.

        Returns:
            As the base module.

        Raises:
            ValueError: `adapter_names` was given: all tokens of a call share the parameter.
        """
        if adapter_names is not None:
            raise ValueError(
                f"`adapter_names` cannot be used with adapters on the parameter {self.name!r}: all rows of a batch "
                "share it. Call the model once per adapter."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if self.has(n)]
        if not active:
            return self.base_layer(*args, **kwargs)
        parameter = self.get_param()
        for adapter_name in active:
            parameter = parameter + self.current_delta(adapter_name)
        path, inner = self.parameter_name, self.base_layer
        while isinstance(inner, CellLayer):
            path, inner = f"base_layer.{path}", inner.base_layer
        # torch's own way to run a module with another tensor in a parameter's place, also when it is compiled
        return torch.func.functional_call(self.base_layer, {path: parameter}, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare module, with the adapters of every layer nested around it merged on demand. PEFT asks for it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        inner = self.base_layer
        if isinstance(inner, ParameterLayer):
            return inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return inner

    def adapt(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Not used: the parameter is adapted, not the output."""
        return output

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        parameter = self.get_param()
        return parameter.device, parameter.dtype
