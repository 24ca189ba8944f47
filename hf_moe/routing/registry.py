"""Routers by name: `config.router_type` chooses the class, `config.router_config` holds its keyword arguments."""

import difflib
import inspect
import types
import typing
from typing import TYPE_CHECKING, Any

from hf_moe.layer_config import layer_config
from hf_moe.named_classes import NamedClasses


if TYPE_CHECKING:
    from .base import BaseRouter


__all__ = ["build_router", "list_routers", "register_router", "router_class", "validate_router"]

ROUTERS: "NamedClasses[BaseRouter]" = NamedClasses(
    "router_type",
    "router",
    __package__,
    {
        "activation": "activation",
        "comet": "tree",
        "dense_to_sparse": "dense_to_sparse",
        "dselect_k": "tree",
        "expert_choice": "expert_choice",
        "fixed_random": "fixed_random",
        "gating_residual": "gating_residual",
        "hash": "hashing",
        "moepp_release": "gating_residual",
        "sigmoid_topk": "topk",
        "softmax_topk": "topk",
        "top_p": "top_p",
    },
)


def register_router(name: str):
    """Class decorator that makes a router available as `router_type=name`.

    Raises:
        ValueError: another class already has that name.
    """
    return ROUTERS.register(name)


def list_routers() -> list[str]:
    """Names accepted by `router_type`, sorted."""
    return ROUTERS.names()


def router_class(name: str) -> "type[BaseRouter]":
    """The class registered as `name`.

    Raises:
        ValueError: no such router; the message lists the names there are and the nearest one.
    """
    return ROUTERS.get(name)


def router_options(cls: type["BaseRouter"]) -> dict[str, Any]:
    """Keyword arguments a router class accepts, its base classes' included, and their annotations."""
    options: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        try:
            hints = typing.get_type_hints(base.__init__)
        except NameError:  # annotated with names its file imports for type checkers only
            hints = {}
        own = {p.name: hints.get(p.name, Any) for p in parameters if p.kind is p.KEYWORD_ONLY}
        options = {**own, **options}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return options


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value read from JSON or YAML can be meant by a plain annotation; True for what it cannot judge."""
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(annotation))
    expected = typing.get_origin(annotation) or annotation
    if not isinstance(expected, type):
        return True
    if isinstance(value, bool):  # an int to Python, but never a number to us
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def validate_router(config: Any) -> None:
    """Checks `router_type` and `router_config` without building anything; called when a config is constructed.

    Raises:
        ValueError: unknown router, unknown option, or an option value of the wrong type or that the router refuses.
    """
    cls = router_class(config.router_type)
    options = router_options(cls)
    for key, value in config.router_config.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"`router_config` has {key!r}, which router {config.router_type!r} does not know. "
                f"It takes {sorted(options)}.{hint}"
            )
        if not _fits(value, options[key]):
            expected = getattr(options[key], "__name__", options[key])
            raise ValueError(f"`router_config[{key!r}]` must be of type {expected}, got {value!r}.")
    cls.validate_config(config, **config.router_config)


def build_router(config: Any, layer_idx: int) -> "BaseRouter":
    """The router of layer `layer_idx` as `config` describes it."""
    config = layer_config(config, layer_idx)
    return router_class(config.router_type)(config, layer_idx, **config.router_config)
