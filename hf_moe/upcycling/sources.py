"""Loading and checking the dense model that is to be upcycled."""

import importlib
import os
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file


__all__ = ["check_source", "check_unquantized", "is_adapter", "is_peft_model", "load_source", "source_name"]


def load_source(model: Any, argument: str = "model") -> PreTrainedModel:
    """A dense model from an instance, a Hub id or a folder, refused where it cannot be upcycled.

    Args:
        model (`PreTrainedModel` or `str`): Instance, Hub id or folder.
        argument (`str`, defaults to `"model"`): Name of the caller's argument, for messages.

    Returns:
        `PreTrainedModel`: The instance itself, or the loaded model in evaluation mode and the dtype of its checkpoint.

    Raises:
        ValueError: quantised, with unmerged adapters, or an incomplete or unreadable checkpoint.
        TypeError: neither a model nor a string.
    """
    if isinstance(model, (str, os.PathLike)):
        model = _load(os.fspath(model), argument)
    check_source(model, argument)
    return model


def check_source(model: Any, argument: str = "model") -> None:
    """Refuses what is no plain transformers model.

    Raises:
        ValueError: quantised, or with unmerged adapters.
        TypeError: not a transformers model.
    """
    if is_peft_model(model) or (isinstance(model, nn.Module) and any(map(_is_tuner_layer, model.modules()))):
        raise ValueError(
            f"`{argument}` has unmerged PEFT adapters; merge them first: `model = model.merge_and_unload()`."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`{argument}` must be a transformers model, a Hub id or a folder, got {type(model).__name__}."
        )
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"`{argument}` is quantised ({_quantization_name(quantization)}), and experts cannot be made from packed "
            "weights; upcycle the unquantised checkpoint and quantise the result."
        )


def _load(name: str, argument: str) -> PreTrainedModel:
    if is_adapter(name):
        raise ValueError(
            f"`{argument}` = {name!r} is a PEFT adapter, not a model; load its base model, merge the adapter and pass "
            "that, or use it as a source of `FromModels`."
        )
    config = AutoConfig.from_pretrained(name)
    check_unquantized(config, name, argument)
    architecture = (config.architectures or [""])[0]
    ours = getattr(importlib.import_module("hf_moe"), architecture, AutoModelForCausalLM)
    cls = getattr(transformers, architecture, ours)
    try:
        loaded: Any = cls.from_pretrained(name, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name!r} cannot be read ({error}): the file is truncated or damaged; download it again."
        ) from error
    model, info = loaded
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"The checkpoint {name!r} does not fill a {type(model).__name__}: {len(lacking)} weights are missing or "
            f"of another shape, the first is {lacking[0]!r}. Use the checkpoint its config belongs to."
        )
    return model.eval()


def check_unquantized(config: Any, name: str, argument: str = "model") -> None:
    """Refuses a checkpoint whose config says that its weights are packed.

    Raises:
        ValueError: it is quantised; the message says how.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise ValueError(
            f"`{argument}` = {name!r} is quantised ({_quantization_name(quantization)}), and experts cannot be made "
            "from packed weights; upcycle the unquantised checkpoint and quantise the result."
        )


def is_peft_model(model: Any) -> bool:
    """Whether `model` is a `PeftModel` (asked without importing PEFT)."""
    return any(c.__name__ == "PeftModel" and c.__module__.startswith("peft.") for c in type(model).__mro__)


def _is_tuner_layer(module: nn.Module) -> bool:
    return any(c.__name__ == "BaseTunerLayer" and c.__module__.startswith("peft.") for c in type(module).__mro__)


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub repository holds a PEFT adapter and no full model."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "adapter_config.json")) and not os.path.isfile(
            os.path.join(name, "config.json")
        )
    return find_adapter_config_file(name) is not None


def _quantization_name(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))


def source_name(model: Any) -> str:
    """What to call a model in configs, cards and messages: its Hub id, a folder's own name, or its class.

    Args:
        model (`PreTrainedModel` or `str`): Instance, Hub id or folder.

    Returns:
        `str`
    """
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", "")
    if not isinstance(name, str) or not name:
        return type(model).__name__
    # A path on one machine means nothing elsewhere.
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.isdir(name) else name
