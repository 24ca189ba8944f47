"""Expert banks by name: `config.expert_type` chooses the class."""

import difflib
import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .stacked import StackedExperts


__all__ = ["build_experts", "experts_class", "list_experts", "register_experts"]

EXPERTS: dict[str, type["StackedExperts"]] = {}

# One line per bank of this package: its name and the file that registers it, imported when first asked for.
BUILTIN = {"mlp": "stacked", "mlp_bias": "stacked", "swiglu": "stacked", "swiglu_bias": "stacked"}


def register_experts(name: str):
    """Class decorator that makes an expert bank available as `expert_type=name`.

    Raises:
        ValueError: another class already has that name.
    """

    def decorate(cls: type["StackedExperts"]) -> type["StackedExperts"]:
        known = EXPERTS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"`expert_type={name!r}` is already taken by {known.__qualname__}; choose another name.")
        EXPERTS[name] = cls
        cls.expert_type = name
        return cls

    return decorate


def list_experts() -> list[str]:
    """Names accepted by `expert_type`, sorted."""
    return sorted({*BUILTIN, *EXPERTS})


def experts_class(name: str) -> type["StackedExperts"]:
    """The class registered as `name`.

    Raises:
        ValueError: no such bank; the message lists the names there are and the nearest one.
    """
    if name not in EXPERTS and name in BUILTIN:
        importlib.import_module(f".{BUILTIN[name]}", __package__)
    if name in EXPERTS:
        return EXPERTS[name]
    near = difflib.get_close_matches(str(name), list_experts(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`expert_type={name!r}` is not a known expert bank. Choose one of {list_experts()}.{hint}")


def build_experts(config: Any) -> "StackedExperts":
    """The feed-forward expert bank of one layer as `config` describes it."""
    return experts_class(config.expert_type)(config)
