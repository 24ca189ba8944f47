"""The helpers through which a folder's `__init__` enters a library's registry. Imports nothing of ours by itself.

Auto tables want classes, and importing every config and modeling file would cost seconds. So importing `hf_moe`
announces each model type with a placeholder; the first use of the type imports its real config class, and the first
config that is created (or unpickled) imports and registers the model classes.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from transformers.models.auto.configuration_auto import AutoConfig


__all__ = [
    "announce_config",
    "announce_processor",
    "ensure_peft_type",
    "load_modeling",
    "register_adapter",
    "register_adapters",
    "register_config",
    "register_experts_implementations",
    "register_quantization",
    "register_quantizers",
    "when_imported",
]

# Config class -> what gives its model classes by the name of their Auto class.
_MODELING: dict[type, Callable[[], dict[str, type]]] = {}
_LOADING: set[type] = set()
_LOADED: set[type] = set()
# Held while classes are made: a second thread waits for the first instead of finding half a type.
LOCK = threading.RLock()


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


def announce_processor(name: str, resolve: Callable[[], type]) -> None:
    """Makes a processor known to `AutoProcessor` without importing it.

    `AutoProcessor` looks the class up by the name in `processor_config.json`, before there is any config, and returns
    the bare tokenizer where it finds none, silently.

    Args:
        name (`str`): Name of the processor class.
        resolve (`Callable`): Returns it.
    """
    namespace = {"__module__": __name__, "resolve": staticmethod(resolve)}
    stand_in = _Placeholder(name, (), namespace)
    # Keys are config classes, and looked up by them later: this one only has to be no other's.
    when_imported(
        "transformers.models.auto.processing_auto",
        lambda auto: auto.AutoProcessor.register(stand_in, stand_in, exist_ok=True),
    )


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
    with LOCK:
        if config_class in _LOADED or config_class in _LOADING:  # importing model classes may create configs
            return
        _LOADING.add(config_class)
        try:
            transformers = importlib.import_module("transformers")
            for auto_name, model_class in _MODELING[config_class]().items():
                getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
            _LOADED.add(config_class)
        finally:
            _LOADING.discard(config_class)


def register_experts_implementations() -> None:
    """Adds ours to transformers' experts functions once the module that holds them is imported.

    Importing that module costs a second (it brings torch's graph capture with it), which `import hf_moe` must not;
    but every model imports it, before it looks a name up.
    """

    # Importing the file registers its functions; where that file is what imported the registry, it is about to.
    when_imported("transformers.integrations.moe", lambda _: importlib.import_module("hf_moe.experts.kernels.front"))


def register_quantizers() -> None:
    """Enters every method of `hf_moe.quantization` in transformers once the module with its quantizers is imported,
    which every model file does before it can load a checkpoint."""
    when_imported(
        "transformers.quantizers.auto", lambda _: importlib.import_module("hf_moe.quantization").register_all()
    )


def register_quantization(method: str, config_class: Any, quantizer_class: Any) -> None:
    """Enters one method: what `quant_method` in `config.json` stands for.

    Registering the same classes again does nothing.

    Args:
        method (`str`): The `quant_method`.
        config_class (`type`): A `QuantizationConfigMixin`.
        quantizer_class (`type`): An `HfQuantizer`.

    Raises:
        ValueError: The name is taken by another package's method.
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    registered = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if registered is config_class:
        return
    if registered is not None:
        raise ValueError(f"`quant_method={method!r}` is already {registered.__module__}.{registered.__name__}.")
    register_quantization_config(method)(config_class)
    register_quantizer(method)(quantizer_class)


def register_adapters() -> None:
    """Enters every type of `hf_moe.adapters` in PEFT once PEFT is imported, which `import hf_moe` does not do."""
    when_imported("peft", lambda _: importlib.import_module("hf_moe.adapters").register_all())


def register_adapter(config_class: Any, tuner_class: Any) -> None:
    """Enters one adapter type in PEFT: its enum member, its config, its tuner and its prefix.

    Registering the same classes again does nothing.

    Args:
        config_class (`type`): A `PeftConfig` with the class attribute `type_name`, such as `"HFMOE_MOSA"`.
        tuner_class (`type`): The `BaseTuner` with the prefix `type_name.lower() + "_"`.

    Raises:
        ValueError: The name is taken by another package's type, or the prefix does not follow from it.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    name = config_class.type_name
    if tuner_class.prefix != f"{name.lower()}_":
        raise ValueError(
            f"`prefix` of {tuner_class.__name__} must be {name.lower() + '_'!r}, got {tuner_class.prefix!r}: "
            "transformers derives the prefix from the type's name when it loads and deletes adapters."
        )
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(ensure_peft_type(name))
    if registered is config_class:
        return
    if registered is not None:
        raise ValueError(f"The PEFT type {name} is already {registered.__module__}.{registered.__name__}.")
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=tuner_class)


def ensure_peft_type(name: str) -> Any:
    """The member `name` of `peft.PeftType`, added if it is not there.

    PEFT has no way to add one, and its registration wants one. An enum keeps its members in three maps, and since
    Python 3.12 as class attributes too; all four are written, and nothing that was there is changed.

    Args:
        name (`str`): Upper-case name, equal to the value, with a namespace of its own: `"HFMOE_..."`.

    Returns:
        `peft.PeftType`

    Raises:
        ValueError: `name` lacks the namespace.
        ImportError: This version of PEFT or Python keeps the members elsewhere.

    Example:
        ```python
        ensure_peft_type("HFMOE_MOSA") is ensure_peft_type("HFMOE_MOSA")  # True
        ```
    """
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    if not name.startswith("HFMOE_") or not name.isupper():
        raise ValueError(f"`name` must be upper-case and begin with 'HFMOE_', got {name!r}.")
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    if hasattr(PeftType.LORA, "_sort_order_"):
        member._sort_order_ = len(PeftType)
    try:
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
    except AttributeError as error:
        raise ImportError(f"`peft.PeftType` cannot be extended by {name} on this Python or PEFT: {error}.") from error
    if PeftType(name) is not member or getattr(PeftType, name) is not member or member not in list(PeftType):
        raise ImportError(
            f"`peft.PeftType` did not take {name}: this version of PEFT or Python keeps enum members elsewhere. "
            "Install peft>=0.21,<1."
        )
    return member


def when_imported(name: str, action: Callable[[ModuleType], Any]) -> None:
    """Runs `action(module)` when a module is imported, or at once if it is.

    This is Python's own import protocol: a finder that knows one name, asks the other finders for it, and leaves
    when it was found. Nothing of the module is replaced.

    Args:
        name (`str`): Full name of the module.
        action (`Callable`): Called once with the module, after its body ran.
    """
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _OnImport(name, action))


class _OnImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], Any]):
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, self)
        return spec


class _ThenAct(importlib.abc.Loader):
    """The module's own loader, and the action after it."""

    def __init__(self, loader: Any, finder: _OnImport):
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            self.finder.action(module)
            sys.meta_path.remove(self.finder)
