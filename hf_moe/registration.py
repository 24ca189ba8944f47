"""The helpers through which a folder's `__init__` enters a library's registry. Imports nothing of ours.

Auto tables want classes, and importing every modeling file would cost seconds. So configs register when `hf_moe` is
imported, and the first config of a type that is created (or unpickled) imports and registers its model classes.
"""

import importlib
from collections.abc import Callable

from transformers import AutoConfig


__all__ = ["load_modeling", "register_config", "registered_configs"]

# Config class -> what gives its model classes by the name of their Auto class.
_MODELING: dict[type, Callable[[], dict[str, type]]] = {}
_LOADED: set[type] = set()


def register_config(config_class: type, modeling: Callable[[], dict[str, type]]) -> None:
    """Makes a model type known to `AutoConfig`; its model classes follow when a config is first created.

    Args:
        config_class (`type`): A config with its own `model_type` (never one of transformers' own).
        modeling (`Callable`): Called once, without arguments; returns `{"AutoModel": model_class, ...}`.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    _MODELING[config_class] = modeling


def load_modeling(config_class: type) -> None:
    """Registers the model classes of a config class with the Auto classes; does nothing the second time."""
    if config_class in _LOADED or config_class not in _MODELING:
        return
    _LOADED.add(config_class)  # first: importing model classes may create configs
    try:
        transformers = importlib.import_module("transformers")
        for auto_name, model_class in _MODELING[config_class]().items():
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
    except BaseException:
        _LOADED.discard(config_class)
        raise


def registered_configs() -> dict[str, type]:
    """Every model type of this package and its config class."""
    return {config_class.model_type: config_class for config_class in _MODELING}
