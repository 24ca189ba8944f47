"""Makes the classes of an upcycled type from its dense classes."""

import functools
import importlib
import inspect
from collections.abc import Callable

from transformers.models.auto import auto_factory, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .configuration_upcycled import PACKAGE, upcycled_config_class
from .modeling_upcycled import UpcycledMixin


__all__ = ["build_auto_classes", "class_by_name", "upcycled_model_class"]

AUTO_CLASSES = {
    name: value
    for name, value in vars(modeling_auto).items()
    if isinstance(value, type) and issubclass(value, auto_factory._BaseAutoModelClass) and name.startswith("AutoModel")
}


def upcycled_model_class(dense_class: type, config_class: type | None = None) -> type:
    """`Upcycled<Class>` for a dense model class, made on first use.

    Args:
        dense_class (`type`): A transformers model class.
        config_class (`type`, *optional*): Its upcycled config class; found by the dense config's type by default.

    Returns:
        `type`: A subclass of `dense_class`.
    """
    if config_class is None:
        config_class = upcycled_config_class(dense_class.config_class.model_type)
    package = importlib.import_module(PACKAGE)
    name = f"Upcycled{dense_class.__name__}"
    if name not in vars(package):
        namespace = {
            "__module__": PACKAGE,
            "__doc__": f"`{dense_class.__name__}` with MoE blocks at `config.moe_modules`.",
            "config_class": config_class,
            "forward": _forward_like(dense_class),
        }
        setattr(package, name, type(name, (UpcycledMixin, dense_class), namespace))
    return vars(package)[name]


def _forward_like(dense_class: type) -> Callable:
    """[`UpcycledMixin`]'s forward with the dense class's signature, by which a Trainer tells the columns it needs."""

    @functools.wraps(dense_class.forward)
    def forward(self, *args, **kwargs):
        return UpcycledMixin.forward(self, *args, **kwargs)

    signature = inspect.signature(dense_class.forward)
    own = inspect.Parameter("output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [p for p in signature.parameters.values() if p.name != own.name]
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[*parameters[:at], own, *parameters[at:]])
    return forward


def build_auto_classes(config_class: type, dense_config_class: type) -> dict[str, type]:
    """The upcycled classes of every head the dense type has, by the name of their Auto class."""
    classes = {}
    for auto_name, auto_class in AUTO_CLASSES.items():
        mapping = auto_class._model_mapping
        if dense_config_class in mapping:
            dense_class = mapping[dense_config_class]
            # Some types have several classes for one head; transformers takes the first.
            dense_class = dense_class[0] if isinstance(dense_class, tuple) else dense_class
            classes[auto_name] = upcycled_model_class(dense_class, config_class)
    return classes


def class_by_name(name: str) -> type:
    """The made class called `name`.

    Raises:
        AttributeError: no dense type has a class of that name.
    """
    package = importlib.import_module(PACKAGE)
    dense_name = name.removeprefix("Upcycled")
    if dense_name != name:
        for dense_type, config_name in CONFIG_MAPPING_NAMES.items():
            if dense_name != config_name and not dense_name.startswith(config_name.removesuffix("Config")):
                continue
            config_class = upcycled_config_class(dense_type)
            if dense_name != config_name:
                build_auto_classes(config_class, CONFIG_MAPPING[dense_type])
            if name in vars(package):
                return vars(package)[name]
    raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
