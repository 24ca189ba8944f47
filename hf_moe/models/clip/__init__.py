"""`moe_clip`: CLIP with Mixture-of-Experts feed-forwards in both towers (CLIP-MoE, 2409.19291), and its towers."""

import importlib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from hf_moe.lazy import lazy_exports
from hf_moe.models.configuration import MoeConfigMixin, parse_moe_layers
from hf_moe.registration import load_modeling, register_config


__all__ = ["MoeClipConfig", "MoeClipTextConfig", "MoeClipVisionConfig"]

#: Fields of [`MoeClipConfig`] that both towers share: read in the text tower, written to both.
SHARED = (
    "balance_mode",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_bias_update_speed",
    "router_z_loss_coef",
)


class _TowerConfig(MoeConfigMixin):
    """What the towers' configs share: two matrices with biases, and dropout inside the experts."""

    attribute_map = {"num_local_experts": "num_experts"}
    moe_block_path = "encoder.layers.*.mlp"

    @property
    def default_expert_type(self) -> str:
        """Two matrices with biases."""
        return "mlp_bias"

    @property
    def moe_layer_indices(self) -> list[int]:
        """Indices of the MoE layers, sorted; none with `moe_layers="none"`."""
        chosen = self.moe_layers
        return [] if chosen in ("none", []) else parse_moe_layers(chosen, self.num_hidden_layers)

    def validate_moe_layers(self) -> None:
        """A choice of layers, or `"none"`."""
        _ = self.moe_layer_indices

    def validate_architecture(self) -> None:
        """[`MoeConfigMixin`]'s rules, and the dropout."""
        super().validate_architecture()
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"`expert_dropout` must be at least 0 and below 1, got {self.expert_dropout}.")


@strict
class MoeClipTextConfig(_TowerConfig, CLIPTextConfig):
    r"""Configuration of [`MoeClipTextModel`]: every field of `CLIPTextConfig` and of [`MoeConfigMixin`].

    Args:
        num_experts (`int`, defaults to 4): As in the paper.
        moe_layers (`str` or `list[int]`, defaults to `"all"`): As in [`parse_moe_layers`]; `"none"` for a dense tower.
        expert_dropout (`float`, defaults to 0.1): Between the two matrices of an expert, in training.

    Example:

    ```python
    >>> from hf_moe import MoeClipTextConfig, MoeClipTextModel
    >>> model = MoeClipTextModel(MoeClipTextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    ```
    """

    model_type = "moe_clip_text_model"
    base_config_key = "text_config"

    num_experts: int | list[int] = 4
    expert_dropout: float | int = 0.1


@strict
class MoeClipVisionConfig(_TowerConfig, CLIPVisionConfig):
    r"""Configuration of [`MoeClipVisionModel`]: every field of `CLIPVisionConfig` and of [`MoeConfigMixin`]. As the
    `vision_config` of a LLaVA it makes that model's tower sparse.

    Args:
        num_experts (`int`, defaults to 4): As in the paper.
        moe_layers (`str` or `list[int]`, defaults to `"all"`): As in [`parse_moe_layers`]; `"none"` for a dense tower.
        expert_dropout (`float`, defaults to 0.1): Between the two matrices of an expert, in training.

    Raises:
        ValueError: a router that reads tokens (`hash`): patches have no ids.

    Example:

    ```python
    >>> from hf_moe import MoeClipVisionConfig, MoeClipVisionModel
    >>> model = MoeClipVisionModel(MoeClipVisionConfig(hidden_size=60, image_size=32, patch_size=8))
    ```
    """

    model_type = "moe_clip_vision_model"
    base_config_key = "vision_config"

    num_experts: int | list[int] = 4
    expert_dropout: float | int = 0.1

    def validate_architecture(self) -> None:
        """[`MoeConfigMixin`]'s rules, and a router for patches."""
        if self.router_type == "hash":
            raise ValueError(
                "`router_type='hash'` reads token ids, which image patches have not. Use another router in "
                "`vision_config`, such as 'softmax_topk'."
            )
        super().validate_architecture()


@strict
class MoeClipConfig(CLIPConfig):
    r"""Configuration of [`MoeClipModel`]: every field of `CLIPConfig`, with towers that have the fields of
    [`MoeConfigMixin`]. `router_aux_loss_coef`, `router_z_loss_coef`, `balance_mode`, `router_bias_update_speed` and
    `output_router_logits` can be read and set here for both towers.

    Args:
        text_config (`dict` or [`MoeClipTextConfig`], *optional*): Text tower.
        vision_config (`dict` or [`MoeClipVisionConfig`], *optional*): Image tower.

    Raises:
        ValueError: neither tower has a MoE layer.

    Example:

    ```python
    >>> from hf_moe import MoeClipConfig, MoeClipModel
    >>> model = MoeClipModel(MoeClipConfig(vision_config={"num_experts": 4}, text_config={"moe_layers": "none"}))
    ```
    """

    model_type = "moe_clip"
    sub_configs_defaults = {"vision_config": MoeClipVisionConfig, "text_config": MoeClipTextConfig}
    #: Trainer takes all other outputs for predictions.
    keys_to_ignore_at_inference = [
        "aux_loss",
        "text_router_logits",
        "vision_router_logits",
        "text_router_indices",
        "vision_router_indices",
        "text_model_output",
        "vision_model_output",
    ]

    text_config: dict | MoeClipTextConfig | None = None
    vision_config: dict | MoeClipVisionConfig | None = None
    # TRL reads `config.auto_map` of every model it loads by path; the Hub shim fills it.
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        load_modeling(type(self))
        shared = {name: kwargs.pop(name) for name in SHARED if name in kwargs}
        super().__post_init__(**kwargs)
        for name, value in shared.items():
            setattr(self, name, value)
        self.validate_architecture()

    def __setstate__(self, state: dict) -> None:
        # A config unpickled in a fresh process never runs `__post_init__`.
        self.__dict__.update(state)
        load_modeling(type(self))

    def __getattr__(self, name: str) -> Any:
        text_config = self.__dict__.get("text_config")
        if name in SHARED and text_config is not None:
            return getattr(text_config, name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        towers = [self.__dict__.get("text_config"), self.__dict__.get("vision_config")]
        if name in SHARED and None not in towers:
            for tower in towers:
                setattr(tower, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def has_router_penalty(self) -> bool:
        """Whether routers of either tower add a loss of their own in training."""
        return self.text_config.has_router_penalty or self.vision_config.has_router_penalty

    @property
    def experts_per_layer(self) -> list[int]:
        """Feed-forward experts of each MoE layer, the text tower's first."""
        return self.text_config.experts_per_layer + self.vision_config.experts_per_layer

    def validate_architecture(self) -> None:
        """That there is a MoE layer at all; the towers check themselves."""
        if not (self.text_config.moe_layer_indices or self.vision_config.moe_layer_indices):
            raise ValueError(
                "`moe_layers` leaves both towers dense. Choose layers in `text_config` or `vision_config`, or use a "
                "CLIP of transformers."
            )


def _build() -> dict[str, type]:
    from transformers import CLIPProcessor

    modeling = importlib.import_module(f"{__name__}.modeling_clip")
    return {
        "AutoProcessor": CLIPProcessor,
        "AutoModel": modeling.MoeClipModel,
        "AutoModelForZeroShotImageClassification": modeling.MoeClipModel,
        "AutoModelForImageClassification": modeling.MoeClipForImageClassification,
    }


def _build_tower(name: str) -> dict[str, type]:
    towers = importlib.import_module(f"{__name__}.tower_clip")
    found = {"AutoModel": getattr(towers, f"MoeClip{name}Model")}
    if name == "Text":
        found["AutoModelForTextEncoding"] = found["AutoModel"]
    return found


register_config(MoeClipConfig, _build)
register_config(MoeClipTextConfig, lambda: _build_tower("Text"))
register_config(MoeClipVisionConfig, lambda: _build_tower("Vision"))

__getattr__, __dir__, _ = lazy_exports(
    __name__,
    {
        "MoeClipForImageClassification": ".modeling_clip",
        "MoeClipModel": ".modeling_clip",
        "MoeClipPreTrainedModel": ".tower_clip",
        "MoeClipTextModel": ".tower_clip",
        "MoeClipTextModelWithProjection": ".projection_clip",
        "MoeClipVisionModel": ".tower_clip",
        "MoeClipVisionModelWithProjection": ".projection_clip",
    },
)
