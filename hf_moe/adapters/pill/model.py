"""Puts PILL's layers where an architecture's norms and value projections are."""

import re
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_moe.adapters.core import CellLayer, CellTuner

from .config import PillConfig
from .layers import AttentionNormLayer, FeedForwardNormLayer, PillLayer, ValueLayer
from .places import KNOWN, Places, places_of


__all__ = ["PillModel"]

_INSIDE = r"(?:.*\.)?(?:language_model|text_model)\."  # where transformers' vision-language models keep the text part


class PillModel(CellTuner):
    """Lets a frozen causal language model, or the one inside a vision-language model, read other modalities.

    Args:
        model (`nn.Module`): The outermost model, which sees `input_ids`: not the language model inside of it.
        config ([`PillConfig`]): The adapter.
        adapter_name (`str`): Its name.

    Raises:
        ValueError: The architecture is not known, or `target_modules` names modules PILL cannot stand at.
        NotImplementedError: A gate is wanted where one layer makes queries, keys and values. The model is as it was
            whenever one of these is raised.

    Example:
        ```python
        model = peft.get_peft_model(llava, hf_moe.PillConfig(modules_to_save=["multi_modal_projector"]))
        model(input_ids=ids, pixel_values=pictures, labels=labels).loss.backward()
        ```
    """

    prefix: str = PillLayer.prefix
    tuner_layer_cls = PillLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {
        name: places.names(attention=True, gate=True) for name, places in KNOWN.items()
    }
    reads: ClassVar[tuple[str, ...]] = ("input_ids",)
    takes: ClassVar[tuple[str, ...]] = ("modality_mask",)

    def _prepare_adapter_config(self, peft_config: PillConfig, model_config: dict) -> PillConfig:
        places = places_of(peft_config, model_config)
        if peft_config.target_modules is None:
            names = places.names(peft_config.adapt_attention, peft_config.attention_gate)
            nested = isinstance(model_config.get("text_config"), dict)
            targets: Any = _inside_text_model(names, peft_config) if nested else set(names)
            peft_config.target_modules = targets
            if nested:  # now part of the expression, beside which PEFT does not want them
                peft_config.layers_to_transform = peft_config.layers_pattern = None
        if peft_config.modality_token_ids is None:
            peft_config.modality_token_ids = _placeholders(peft_config.modalities[1:], model_config)
        return peft_config

    def _prepare_model(self, peft_config: PillConfig, model: nn.Module) -> None:
        """Looks at all targets before anything is changed."""
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == "all-linear":
            raise ValueError(
                "`target_modules='all-linear'` cannot be used with PILL, which stands at norms and value projections. "
                "Leave `target_modules` out."
            )
        places = places_of(peft_config, self.get_model_config(model))
        targets = {
            key: module
            for key, module in model.named_modules()
            if f".{PillLayer.prefix}" not in key and self._check_target_module_exists(peft_config, key)
        }
        for key, module in targets.items():
            self._check_target(peft_config, places, key, module)
            inside = [other for other in targets if other.startswith(f"{key}.")]
            if inside:
                raise ValueError(
                    f"`target_modules` matches {key!r} and, inside of it, {inside[0]!r}; only one can be."
                )

    def _check_target(self, config: PillConfig, places: Places, key: str, module: nn.Module) -> None:
        allowed = places.names(config.adapt_attention, config.attention_gate)
        if key.rpartition(".")[2] not in allowed:
            raise ValueError(
                f"`target_modules` matches {key!r}, but PILL stands at modules named {allowed} of this model (given "
                f"`adapt_attention={config.adapt_attention}`, `attention_gate={config.attention_gate}`)."
            )
        if isinstance(module, BaseTunerLayer) and not isinstance(module, PillLayer):
            raise ValueError(
                f"`target_modules` matches {key!r}, which an adapter of another type has already "
                f"({type(module).__name__}); the two could not be loaded again. Leave it out of that one's targets."
            )
        if key.rpartition(".")[2] == places.value_projection and not isinstance(module, PillLayer):
            self._number_of_heads(key, module)

    def make_layer(self, config: Any, target: nn.Module, key: str, parameter_name: str | None) -> CellLayer:
        """The layer for a norm or a value projection."""
        if parameter_name is not None:
            raise ValueError(f"`target_parameters` cannot be used with {type(config).__name__}; got {key!r}.")
        places = places_of(config, self.get_model_config(self.model))
        name = key.rpartition(".")[2]
        if name == places.value_projection:
            heads = self._number_of_heads(key, target)
            width: Any = target.in_features
            return ValueLayer(target, self.runtime, key, width=width, heads=heads)
        width = self._width(target)
        if name == places.attention_norm:
            return AttentionNormLayer(target, self.runtime, key, width=width)
        return FeedForwardNormLayer(target, self.runtime, key, width=width, last=self._is_last(key))

    def _text_config(self) -> Any:
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def _width(self, norm: Any) -> int:
        weight = getattr(norm, "weight", None)
        return len(weight) if weight is not None else self._text_config().hidden_size

    def _number_of_heads(self, key: str, projection: Any) -> int:
        attention: Any = self.model.get_submodule(key.rpartition(".")[0])
        size = getattr(attention, "head_dim", None) or getattr(self._text_config(), "head_dim", None)
        features = getattr(projection, "out_features", None)
        if size is None or features is None or features % size:
            raise ValueError(
                f"PILL gates values per head, but {key!r} ({type(projection).__name__}, {features} features) cannot "
                f"be divided into heads of size {size}. Pass `attention_gate=False`."
            )
        expected = getattr(self._text_config(), "num_key_value_heads", None)
        if expected is not None and features > expected * size:
            raise NotImplementedError(
                f"{key!r} has {features} features where {expected} key-value heads of size {size} make "
                f"{expected * size}: it makes more than the values. Pass `attention_gate=False`."
            )
        return features // size

    def _is_last(self, key: str) -> bool:
        found = re.match(r"(.*?)\.?(\d+)\.", key)
        return found is not None and int(found[2]) == len(self.model.get_submodule(found[1])) - 1  # pyright: ignore


def _placeholders(modalities: list[str], model_config: dict[str, Any]) -> dict[str, list[int]]:
    found = {}
    for name in modalities:
        for key in (f"{name}_token_id", f"{name}_token_index"):
            if isinstance(model_config.get(key), int):
                found[name] = [model_config[key]]
    if not found and isinstance(model_config.get("text_config"), dict):
        raise ValueError(
            f"The config of model type {model_config.get('model_type')!r} does not say which tokens stand for "
            f"{' or '.join(modalities)}. Pass `modality_token_ids={{{modalities[0]!r}: ...}}`, or `{{}}` if each call "
            "comes with a `modality_mask`."
        )
    return found


def _inside_text_model(names: list[str], config: PillConfig) -> str:
    layers: Any = config.layers_to_transform
    numbers = [layers] if isinstance(layers, int) else layers
    within = rf"(?:.*\.)?(?:{'|'.join(map(str, numbers))})\." if numbers else r"(?:.*\.)?"
    return rf"{_INSIDE}{within}(?:self_attn\.)?(?:{'|'.join(names)})"
