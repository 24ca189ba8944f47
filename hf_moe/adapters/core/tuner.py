"""Puts cell layers into a model: the part of PEFT's tuner contract that all types share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import CellLayer
from .parameter import ParameterLayer
from .runtime import Runtime, install_runtime, remove_runtime


__all__ = ["CellTuner"]


class CellTuner(BaseTuner):
    """Base of the tuners of this package's adapter types.

    A type sets `prefix`, `tuner_layer_cls` (the common base of its layers), `target_module_mapping`, and, where its
    cells need conditions, `reads` and `takes` (see [`Runtime.declare`]); it overrides [`~CellTuner.make_layer`].
    """

    target_module_mapping: ClassVar[dict[str, Any]] = {}
    reads: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()

    def make_layer(self, config: Any, target: nn.Module, key: str, parameter_name: str | None) -> CellLayer:
        """The layer that takes the place of `target`.

        Args:
            config ([`MoeAdapterConfig`]): Of the adapter that is added.
            target (`nn.Module`): The module.
            key (`str`): Its path.
            parameter_name (`str`, *optional*): Name of the parameter, when one was targeted.

        Returns:
            [`CellLayer`]

        Raises:
            ValueError: This type cannot adapt such a module.
        """
        if parameter_name is not None:
            raise ValueError(f"`target_parameters` cannot be used with {type(config).__name__}; got {key!r}.")
        return self.tuner_layer_cls(target, self.runtime, key)

    @property
    def runtime(self) -> Runtime | None:
        """Conditions of the running call, for types that need any."""
        if not (self.reads or self.takes):
            return None
        return install_runtime(self.model, self.reads, self.takes)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, but an error leaves a model that had no adapter of this type as it was."""
        first = not any(isinstance(module, self.tuner_layer_cls) for module in self.model.modules())
        try:
            super().inject_adapter(*args, **kwargs)
        except Exception:
            if first:
                self.unload()
            raise

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        existing = isinstance(target, self.tuner_layer_cls)
        if existing and isinstance(target, ParameterLayer):
            existing = target.parameter_name == parameter_name
        if existing:
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.make_layer(peft_config, target, current_key, parameter_name)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version reads `child.weight`, which a block has not; the cells are on its device already.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls):
                for adapter_name in module._get_available_adapters():
                    refusal = module.merge_refusal(adapter_name)
                    if refusal is not None:
                        raise NotImplementedError(
                            f"{type(self).__name__} cannot merge adapter {adapter_name!r} into {module.name!r}: "
                            f"{refusal}. Use `unload()` to get the base model back."
                        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_runtime(self.model)
        return model

    def set_stage(self, adapter_name: str, stage: str) -> None:
        """Goes to another training stage: other containers train from now on.

        Args:
            adapter_name (`str`): The adapter.
            stage (`str`): A value its config's `stage` may have.

        Raises:
            ValueError: The adapter has no stages, or not this one.
        """
        config: Any = self.peft_config.get(adapter_name)
        if config is None or not hasattr(config, "stage"):
            raise ValueError(f"`adapter_name` {adapter_name!r} is not an adapter with stages.")
        before, config.stage = config.stage, stage
        try:
            config.validate()
        except ValueError:
            config.stage = before
            raise
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls) and module.has(adapter_name):
                module.freeze(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, self.tuner_layer_cls)]
        known = set().union(*(layer._get_available_adapters() for layer in layers))
        unknown = set(adapter_names) - known - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        hook = partial(_hand_over, list(adapter_names), beams if isinstance(beams, int) else 1)
        wrappers = [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in (*layers, *wrappers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # <path>.<prefix><container>.<adapter>.<inside the cell>: PEFT's rule knows only cells without an inside.
        pattern = rf"(\.{re.escape(cls.prefix)}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)"
        if re.search(pattern, key):
            return re.sub(pattern, r"\1", key)
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _hand_over(
    adapter_names: list[str], beams: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    # Beam search repeats the rows, but not for an encoder, which has run before they were repeated.
    rows = len(args[0]) if args else len(adapter_names)
    if beams > 1 and rows == beams * len(adapter_names):
        adapter_names = [name for name in adapter_names for _ in range(beams)]
    return args, {**kwargs, "adapter_names": adapter_names}
