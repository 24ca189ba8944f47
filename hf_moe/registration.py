"""The helpers through which a folder's `__init__` enters a library's registry. Imports nothing of ours.

Auto tables want classes, and importing every config and modeling file would cost seconds. So importing `hf_moe`
announces each model type with a placeholder; the first use of the type imports its real config class, and the first
config that is created (or unpickled) imports and registers the model classes.
"""

import importlib
from collections.abc import Callable

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


__all__ = ["announce_config", "load_modeling", "register_config", "registered_configs"]

# Config class -> what gives its model classes by the name of their Auto class.
_MODELING: dict[type, Callable[[], dict[str, type]]] = {}
_LOADED: set[type] = set()
# Model type -> "module:Class" of its config.
_ANNOUNCED: dict[str, str] = {}


def announce_config(model_type: str, target: str) -> None:
    """Makes a model type known to `AutoConfig` without importing its config class.

    Args:
        model_type (`str`): The type's name in `config.json`.
        target (`str`): `"module:Class"`; importing the module must call [`register_config`] for the class.
    """
    _ANNOUNCED[model_type] = target

    def resolve() -> type:
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)

    def new(cls, *args, **kwargs):
        # Not an instance of the placeholder, so Python does not call its `__init__` on it.
        return resolve()(*args, **kwargs)

    def from_dict(cls, config_dict, **kwargs):
        return resolve().from_dict(config_dict, **kwargs)

    namespace = {
        "__module__": __name__,
        "__doc__": f"Stands for `{target}` until it is first needed.",
        "__new__": new,
        "from_dict": classmethod(from_dict),
        "model_type": model_type,
    }
    placeholder = type(target.partition(":")[2], (PreTrainedConfig,), namespace)
    AutoConfig.register(model_type, placeholder, exist_ok=True)


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


def registered_configs() -> dict[str, str]:
    """Every model type of this package and the `"module:Class"` of its config."""
    return dict(_ANNOUNCED)
