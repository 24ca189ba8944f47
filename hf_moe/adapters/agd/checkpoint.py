"""Saving and loading AGD adapters of pipelines, whose own functions know LoRA only."""

import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from hf_moe.adapters.core.runtime import remove_runtime
from hf_moe.files import new_folder

from .conditions import remove_conditions
from .config import AgdConfig
from .guidance import denoiser_of
from .layer import AgdLayer


__all__ = ["load_agd", "save_agd", "unload_agd"]

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# What PEFT's own files have in front of each key: `PeftModel.from_pretrained` reads our files, and we its.
_PEFT_PREFIX = "base_model.model."


def save_agd(pipe: Any, folder: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Saves an AGD adapter: `adapter_config.json` and `adapter_model.safetensors`, nothing of the base.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`): A pipeline, its network, or a PEFT model.
        folder (`str` or `os.PathLike`): A new folder. `PeftModel.from_pretrained` and [`load_agd`] read it.
        adapter_name (`str`, defaults to `"default"`): Which adapter.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: There is no such adapter, or the folder holds something.

    Example:
        ```python
        save_agd(pipe, "agd-dit")
        load_agd(other_pipe, "agd-dit")
        ```
    """
    model = _network(pipe)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, AgdConfig):
        raise ValueError(f"`adapter_name` {adapter_name!r} is not an AGD adapter of {type(model).__name__}.")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = {_PEFT_PREFIX + key.removeprefix(_PEFT_PREFIX): v.detach().cpu().contiguous() for key, v in state.items()}
    with new_folder(folder) as partial:
        save_file(state, partial / _WEIGHTS, metadata={"format": "pt"})
        training, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(str(partial))
        finally:
            config.inference_mode = training
    return Path(folder)


def load_agd(pipe: Any, folder: str | os.PathLike, adapter_name: str = "default") -> Any:
    """Puts a saved AGD adapter into a pipeline's network, beside what is active there (LoRA must be loaded before).

    Any checkpoint of the same architecture will do: the adapter was trained on one and may be used on another.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`): A pipeline or its network.
        folder (`str` or `os.PathLike`): What [`save_agd`] or `PeftModel.save_pretrained` wrote.
        adapter_name (`str`, defaults to `"default"`): A name that is not taken.

    Returns:
        `nn.Module`: The network, changed in place.

    Raises:
        ValueError: The folder holds no AGD adapter, the name is taken, or the network has other blocks. The network is
            as it was.

    Note: Save a LoRA before loading an AGD adapter: inside adapted blocks its keys change.
    """
    model, folder = _network(pipe), Path(folder)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).exists():
            raise ValueError(f"`{folder}` holds no adapter: {file} is missing.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, AgdConfig):
        raise ValueError(f"`{folder}` holds an adapter of type {config.peft_type}, not AGD.")
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"`adapter_name` {adapter_name!r} is taken. Choose another.")
    state = {key.removeprefix(_PEFT_PREFIX): value for key, value in load_file(folder / _WEIGHTS).items()}
    modules = dict(model.named_modules())
    sites = {key.split(f".{AgdLayer.prefix}")[0] for key in state}
    missing = sorted(site for site in sites if site not in modules)
    if missing:
        raise ValueError(
            f"The adapter has a cell for {missing[0]!r} (and {len(missing) - 1} more), which {type(model).__name__} "
            "does not have. It was made for another architecture."
        )
    active = _active_adapters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = dict(getattr(model, "peft_config", {}))
    if hasattr(model, "peft_config"):
        del model.peft_config  # else PEFT warns of what is meant here: several adapters
    try:
        inject_adapter_in_model(config, model, adapter_name)
        result = set_peft_model_state_dict(model, state, adapter_name=adapter_name)
        absent = [key for key in result.missing_keys if f".{AgdLayer.prefix}" in key]
        if result.unexpected_keys or absent:
            raise ValueError(f"keys differ: {[*result.unexpected_keys, *absent][:3]}")
    except (ValueError, RuntimeError) as error:
        model.peft_config = others | getattr(model, "peft_config", {})
        _remove(model, adapter_name)
        _activate(model, active, trained)
        raise ValueError(f"The adapter in `{folder}` does not fit {type(model).__name__}: {error}") from error
    model.peft_config = others | model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    _activate(model, [*active, adapter_name], trained)
    return model


def unload_agd(pipe: Any, adapter_name: str = "default") -> Any:
    """Takes an AGD adapter out again; the network is the one it was.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`): A pipeline or its network.
        adapter_name (`str`, defaults to `"default"`): Which adapter.

    Returns:
        `nn.Module`: The network, changed in place.

    Raises:
        ValueError: There is no such adapter.
    """
    model = _network(pipe)
    if not isinstance(getattr(model, "peft_config", {}).get(adapter_name), AgdConfig):
        raise ValueError(f"`adapter_name` {adapter_name!r} is not an AGD adapter of {type(model).__name__}.")
    _remove(model, adapter_name)
    return model


def _network(pipe: Any) -> Any:
    model = denoiser_of(pipe)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _active_adapters(model: Any) -> list[str]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return list(
        dict.fromkeys(name for layer in layers for name in layer.active_adapters if layer._get_available_adapters())
    )


def _activate(model: Any, names: list[str], trained: list[Any]) -> None:
    """These adapters are active, and these parameters train (a LoRA, perhaps)."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names, inference_mode=True)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def _remove(model: Any, adapter_name: str) -> None:
    model.peft_config.pop(adapter_name, None)
    for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, AgdLayer)]:
        if layer.has(adapter_name):
            layer.delete_adapter(adapter_name)
        if not layer._get_available_adapters():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.base_layer)
    if not any(isinstance(config, AgdConfig) for config in model.peft_config.values()):
        remove_conditions(model)
    if not model.peft_config:
        remove_runtime(model)
        del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False
