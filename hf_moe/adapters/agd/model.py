"""Puts AGD layers into a denoiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_moe.adapters.core import CellTuner

from .conditions import ARGUMENTS, SCALE, install_conditions, remove_conditions
from .guidance import set_condition_fn, set_guidance
from .layer import AgdLayer
from .sites import default_sites, output_projection, resolve_conditions


__all__ = ["AgdModel"]


class AgdModel(CellTuner):
    """Tuner of [`AgdConfig`]; its methods are reached through the PEFT model, as in `model.set_guidance(5.0)`."""

    prefix = "hfmoe_agd_"
    tuner_layer_cls = AgdLayer
    # Language models with guided logits; denoisers are told by their class.
    target_module_mapping = {
        name: ["self_attn"]
        for name in ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "opt")
    } | {"gpt2": ["attn"]}
    reads = tuple(argument for names in ARGUMENTS.values() for argument in names)
    takes = (SCALE,)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            sites = default_sites(self.model) or self.target_module_mapping.get(model_config.get("model_type"))
            if sites is None:
                raise ValueError(
                    f"Please specify `target_modules` in `peft_config`: the attention blocks of "
                    f"{type(self.model).__name__} are not known."
                )
            peft_config.target_modules = set(sites)
        resolve_conditions(self.model, peft_config)
        return peft_config

    def _create_and_replace(self, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        runtime: Any = self.runtime
        conditions = install_conditions(self.model, runtime)
        for path in (peft_config.condition_modules or {}).values():
            conditions.keep(self.model, path)
        super()._create_and_replace(peft_config, adapter_name, *args, **kwargs)

    def make_layer(self, config: Any, target: nn.Module, key: str, parameter_name: str | None) -> AgdLayer:
        """See [`CellTuner.make_layer`]."""
        if parameter_name is not None:
            super().make_layer(config, target, key, parameter_name)
        runtime: Any = self.runtime
        return AgdLayer(target, runtime, key, install_conditions(self.model, runtime))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_conditions(self.model)
        return model

    def set_guidance(self, scale: Any) -> None:
        """See [`~hf_moe.adapters.agd.set_guidance`]."""
        set_guidance(self.model, scale)

    def set_condition_fn(self, condition_fn: Callable[[tuple, dict[str, Any]], dict[str, Any]] | None) -> None:
        """See [`~hf_moe.adapters.agd.set_condition_fn`]."""
        set_condition_fn(self.model, condition_fn)

    @torch.no_grad()
    def fold(self, scale: float, adapter_name: str | None = None) -> nn.Module:
        """The base model with the adapter's effect at one scale in the biases of its attention blocks.

        With the scale as the only condition that effect is a constant vector per block.

        Args:
            scale (`float`): The guidance scale w.
            adapter_name (`str`, *optional*): The active one if left out.

        Returns:
            `nn.Module`: The base model, without adapters.

        Raises:
            NotImplementedError: The adapter depends on more than the scale, or a block's last layer is unknown;
                nothing is changed then.
        """
        name = adapter_name or self.active_adapters[0]
        config: Any = self.peft_config[name]
        names = config.condition_on
        if names != ("scale",):
            raise NotImplementedError(
                f"`fold` needs an adapter with `condition_on=('scale',)`, but {name!r} has {names}: its effect is not "
                "the same at every step."
            )
        layers = [m for m in self.model.modules() if isinstance(m, AgdLayer) and m.has(name)]
        outputs = [output_projection(layer.get_base_layer(), layer.name) for layer in layers]
        for layer, (output, divisor) in zip(layers, outputs, strict=True):
            cell = layer.cell("cell", name)
            weight = output.weight
            added = cell.constant(torch.tensor([scale], device=weight.device))[0].to(weight.dtype) * divisor
            if output.bias is None:
                output.bias = nn.Parameter(added, requires_grad=False)
            else:
                output.bias.add_(added)
        return self.unload()
