"""Configs of `upcycled_<type>`: the dense type's config with the MoE fields."""

import importlib
from dataclasses import dataclass, field

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from hf_moe.models import UPCYCLED_PREFIX
from hf_moe.models.configuration import MoeConfigMixin
from hf_moe.registration import register_config


__all__ = ["UpcycledConfigMixin", "upcycled_config_class"]

PACKAGE = "hf_moe.models.upcycled"


@dataclass(kw_only=True)
class UpcycledConfigMixin(MoeConfigMixin):
    """[`MoeConfigMixin`] for a model whose feed-forwards are named one by one.

    Args:
        moe_modules (`list[str]`): Module paths of the MoE blocks, relative to the base model (`"layers.0.mlp"`).
        expert_hidden_size (`int`, *optional*): D of the experts; `hidden_size` by default.
        expert_hidden_act (`str`, *optional*): Activation of the experts; `hidden_act` by default.
    """

    moe_modules: list[str] = field(default_factory=list)
    expert_hidden_size: int | None = None
    expert_hidden_act: str | None = None

    @property
    def expert_activation(self) -> str:
        """What the upcycling found in the dense module."""
        return self.expert_hidden_act or self.hidden_act

    @property
    def intermediate_width(self) -> int:
        """Only a default: the upcycling writes `moe_intermediate_size`, as dense types name the width in many ways."""
        return getattr(self, "intermediate_size", None) or 1

    @property
    def moe_layer_indices(self) -> list[int]:
        """The blocks are numbered in module order."""
        return list(range(len(self.moe_modules)))

    def validate_architecture(self):
        """[`MoeConfigMixin`]'s rules, and routers that can work without a modified decoder.

        Raises:
            ValueError: a router that hands state from layer to layer.
        """
        from hf_moe.routing.registry import router_class

        super().validate_architecture()
        if router_class(self.router_type).carries_state:
            raise ValueError(
                f"`router_type={self.router_type!r}` hands state from layer to layer, which `{self.model_type}` "
                "cannot do: its decoder is the dense one. Use another router, or a type with a backbone of its own."
            )


def upcycled_config_class(dense_type: str) -> type:
    """The config class of `upcycled_<dense_type>`, made on first use.

    Args:
        dense_type (`str`): A `model_type` of transformers.

    Returns:
        `type`: A subclass of the dense config class.

    Raises:
        ValueError: no such type.
    """
    from .factory import build_auto_classes

    if dense_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"`dense_type={dense_type!r}` is not a model type of transformers.")
    package = importlib.import_module(PACKAGE)
    dense_class = CONFIG_MAPPING[dense_type]
    name = f"Upcycled{dense_class.__name__}"
    if name not in vars(package):
        namespace = {
            "__module__": PACKAGE,
            "__doc__": f"`{dense_class.__name__}` with the fields of [`UpcycledConfigMixin`].",
            "model_type": UPCYCLED_PREFIX + dense_type,
            "attribute_map": {**dense_class.attribute_map, "num_local_experts": "num_experts"},
            # Plans of the dense feed-forwards do not fit the blocks that replace them.
            "base_model_tp_plan": None,
            "base_model_ep_plan": None,
        }
        config_class = strict(type(name, (UpcycledConfigMixin, dense_class), namespace))
        setattr(package, name, config_class)
        register_config(config_class, lambda: build_auto_classes(config_class, dense_class))
    return vars(package)[name]
