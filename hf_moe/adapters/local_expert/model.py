"""Puts local experts beside the heads of a model."""

from typing import Any, ClassVar

from torch import nn

from hf_moe.adapters.core import CellLayer, CellTuner

from .features import feature_width
from .layer import LocalExpertLayer


__all__ = ["LocalExpertModel"]

_SCORE = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", "gpt2", "opt")
_CLASSIFIER = ("bert", "distilbert", "electra", "albert", "vit", "swin", "deit", "convnext", "wav2vec2", "hubert")


class LocalExpertModel(CellTuner):
    """Tuner of [`LocalExpertConfig`]."""

    prefix = "hfmoe_local_expert_"
    tuner_layer_cls = LocalExpertLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {
        **{model_type: ["score"] for model_type in _SCORE},
        **{model_type: ["classifier"] for model_type in _CLASSIFIER},
        "roberta": ["classifier.out_proj"],
        "xlm-roberta": ["classifier.out_proj"],
    }
    reads = ("attention_mask",)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        name, runtime = config.gate_feature_module, self.runtime
        if name == "input" and runtime is not None:
            self._require_width(config)
            runtime.declare(reads=("input",))
        elif name is not None and runtime is not None:
            try:
                module = self.model.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"`gate_feature_module` must be the path of a module of the model or 'input', got {name!r}. "
                    "See `model.named_modules()`."
                ) from None
            # Into the config, and so into its file: loading need not find it out again.
            config.gate_features = config.gate_features or feature_width(module, getattr(self.model, "config", None))
            self._require_width(config)
            runtime.keep_output(module, name)
        return config

    def _require_width(self, config: Any) -> None:
        if config.gate_features is None:
            raise ValueError(
                f"`gate_features` must be given with `gate_feature_module={config.gate_feature_module!r}`: its width "
                "cannot be read off the model."
            )

    def make_layer(self, config: Any, target: nn.Module, key: str, parameter_name: str | None) -> CellLayer:
        if not isinstance(target, nn.Linear):
            raise ValueError(
                f"`target_modules` must name heads that are Linear, got {key!r} ({type(target).__name__})."
            )
        return LocalExpertLayer(target, self.runtime, key)

    def set_threshold(self, adapter_name: str, threshold: float) -> None:
        """From which gate probability on the local expert answers; saved with the adapter.

        Args:
            adapter_name (`str`): The adapter.
            threshold (`float`): Between 0 (always) and 2 (never).

        Raises:
            ValueError: No such adapter, or a threshold out of range.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"`adapter_name` must be one of {list(self.peft_config)}, got {adapter_name!r}.")
        if not 0 <= threshold <= 2:
            raise ValueError(f"`threshold` must be between 0 (always) and 2 (never), got {threshold}.")
        for layer in self.model.modules():
            if isinstance(layer, LocalExpertLayer) and layer.has(adapter_name):
                layer.cell("gate", adapter_name).threshold.fill_(threshold)
