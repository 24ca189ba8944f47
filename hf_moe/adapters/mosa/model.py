"""Puts sparse adapters into a model, and collapses them into plain ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from hf_moe.adapters.core import CellTuner

from .config import MosaConfig
from .hosts import HOSTS, family_targets, residual_source
from .layer import MosaLayer, ParamWrapper


__all__ = ["MosaModel", "collapse_adapter", "collapsed"]


class MosaModel(CellTuner):
    """The tuner of [`MosaConfig`]; made by `peft.get_peft_model`.

    Args:
        model (`nn.Module`): The model to adapt.
        config ([`MosaConfig`] or `dict`): Of the first adapter.
        adapter_name (`str`): Its name.

    Example:
        ```python
        model = get_peft_model(base, MosaConfig(r=16))
        model.collapse_adapter("default")  # after training: one plain adapter
        ```
    """

    prefix = "hfmoe_mosa_"
    tuner_layer_cls = MosaLayer
    # of the default style; others are looked up in `_prepare_adapter_config`
    target_module_mapping: ClassVar[dict[str, Any]] = {name: [host.feed_forward] for name, host in HOSTS.items()}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            found = family_targets(peft_config.style, model_config.get("model_type", ""))
            if found is not None:
                targets, exclude, reads = found
                peft_config.target_modules = set(targets)
                if exclude and not isinstance(peft_config.exclude_modules, str):
                    peft_config.exclude_modules = {*(peft_config.exclude_modules or ()), *exclude}
                if peft_config.style == "parallel" and peft_config.adapter_input is None:
                    peft_config.adapter_input = reads
        elif peft_config.target_modules is None:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def make_layer(self, config: MosaConfig, target: nn.Module, key: str, parameter_name: str | None) -> MosaLayer:
        """See [`~hf_moe.adapters.core.CellTuner.make_layer`]."""
        if parameter_name is not None:
            return ParamWrapper(target, parameter_name, key)
        settings = self.get_model_config(self.model)
        settings = settings.get("text_config") or settings
        return MosaLayer(target, None, key, settings.get("hidden_size"))

    def _create_and_replace(
        self,
        peft_config: MosaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        residual = peft_config.style == "parallel" and peft_config.adapter_input == "residual"
        source = residual_source(self.model, current_key) if residual else None
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, parameter_name
        )
        layer = getattr(parent, target_name)
        if source is not None and isinstance(layer, MosaLayer):
            layer.listen(source)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers = [module for module in self.model.modules() if isinstance(module, MosaLayer)]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in layers:
            layer.stop_listening()
        return model

    def collapse_adapter(self, adapter_name: str) -> None:
        """As [`collapse_adapter`]."""
        collapse_adapter(self.model, adapter_name, self.peft_config)


def collapse_adapter(model: Any, adapter_name: str, configs: dict[str, Any] | None = None) -> None:
    """Makes one plain adapter of the plain adapter's size out of a trained sparse one.

    What evaluation gives stays as it is, and so does the cost of inference; training from then on is that of the plain
    adapter. Saved and loaded like any other. Optimizers made before hold parameters that no longer exist.

    Args:
        model (`nn.Module`): A model with adapters of this type, also one given to transformers' `add_adapter`.
        adapter_name (`str`): The adapter.
        configs (`dict[str, MosaConfig]`, *optional*): By adapter; those of `model` if left out.

    Raises:
        ValueError: There is no adapter of this type with this name.

    Example:
        ```python
        model.collapse_adapter("default")
        model.save_pretrained("plain-adapter")
        ```
    """
    known: dict[str, Any] = configs or getattr(model, "peft_config", {})
    config = known.get(adapter_name)
    if not isinstance(config, MosaConfig):
        ours = [name for name, other in known.items() if isinstance(other, MosaConfig)]
        raise ValueError(f"`adapter_name` must be one of the MoSA adapters {ours}, got {adapter_name!r}.")
    for module in model.modules():
        if isinstance(module, MosaLayer) and module.has(adapter_name):
            module.collapse(adapter_name)
    config.num_experts, config.merge_scale = 1, 1.0


@contextmanager
def collapsed(model: Any, adapter_names: list[str]) -> Iterator[None]:
    """Inside, the adapters are the plain ones they would collapse into; afterwards they are as they were.

    Args:
        model (`nn.Module`): As for [`collapse_adapter`].
        adapter_names (`list[str]`): The adapters.

    Raises:
        ValueError: As [`collapse_adapter`].
    """
    configs = model.peft_config
    cells = [module.hfmoe_mosa_cell for module in model.modules() if isinstance(module, MosaLayer)]
    kept = [(cell, name, cell[name]) for cell in cells for name in adapter_names if name in cell]
    fields = [(configs[name], dict(vars(configs[name]))) for name in adapter_names if name in configs]
    try:
        for name in adapter_names:
            collapse_adapter(model, name)
        yield
    finally:
        for cell, name, before in kept:
            cell[name] = before
        for config, before in fields:
            vars(config).update(before)
