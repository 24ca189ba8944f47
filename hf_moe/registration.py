"""The helpers through which a folder's `__init__` enters a library's registry. Imports nothing of ours.

Auto tables want classes, and importing every config and modeling file would cost seconds. So importing `hf_moe`
announces each model type with a placeholder; the first use of the type imports its real config class, and the first
config that is created (or unpickled) imports and registers the model classes.
"""

import importlib
from collections.abc import Callable

from transformers.models.auto.configuration_auto import AutoConfig


__all__ = ["announce_config", "load_modeling", "register_config"]

# Config class -> what gives its model classes by the name of their Auto class.
_MODELING: dict[type, Callable[[], dict[str, type]]] = {}
_LOADED: set[type] = set()


class _Placeholder(type):
    """Metaclass of the stand-ins that `AutoConfig` holds until a type is first needed: everything asked of the class
    is answered by the real one."""

    def __call__(cls, *args, **kwargs):
        return cls.resolve()(*args, **kwargs)

    def __getattr__(cls, name: str):
        return getattr(type.__getattribute__(cls, "resolve")(), name)


def announce_config(model_type: str, name: str, resolve: Callable[[], type]) -> None:
    """Makes a model type known to `AutoConfig` without importing its config class.

    Args:
        model_type (`str`): The type's name in `config.json`.
        name (`str`): Name of the config class.
        resolve (`Callable`): Returns the config class, having called [`register_config`] for it.
    """
    namespace = {"__module__": __name__, "model_type": model_type, "resolve": staticmethod(resolve)}
    AutoConfig.register(model_type, _Placeholder(name, (), namespace), exist_ok=True)


def register_config(config_class: type, modeling: Callable[[], dict[str, type]]) -> None:
    """Enters a config class in `AutoConfig`; its model classes follow when a config is first created.

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
