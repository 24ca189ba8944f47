"""Expert banks by name: `config.expert_type` chooses the class."""

from typing import TYPE_CHECKING, Any

from hf_moe.named_classes import NamedClasses


if TYPE_CHECKING:
    from .stacked import StackedExperts


__all__ = ["build_experts", "experts_class", "list_experts", "register_experts"]

EXPERTS: "NamedClasses[StackedExperts]" = NamedClasses(
    "expert_type",
    "expert bank",
    __package__,
    {
        "mlp": "stacked",
        "mlp_bias": "stacked",
        "swiglu": "stacked",
        "swiglu_bias": "stacked",
        "ternary": "ternary",
    },
)


def register_experts(name: str):
    """Class decorator that makes an expert bank available as `expert_type=name`.

    Raises:
        ValueError: another class already has that name.
    """
    return EXPERTS.register(name)


def list_experts() -> list[str]:
    """Names accepted by `expert_type`, sorted."""
    return EXPERTS.names()


def experts_class(name: str) -> "type[StackedExperts]":
    """The class registered as `name`.

    Raises:
        ValueError: no such bank; the message lists the names there are and the nearest one.
    """
    return EXPERTS.get(name)


def build_experts(config: Any) -> "StackedExperts":
    """The feed-forward expert bank of one layer as `config` describes it."""
    return experts_class(config.expert_type)(config)
