"""mergekit's MoE YAML as an input format."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .builders.from_models import FromModels
from .router_init.base import RouterInit
from .router_init.prompts import Prompts
from .router_init.random import Normal


__all__ = ["read_mergekit"]

FIELDS = {"base_model", "gate_mode", "dtype", "experts_per_token", "experts", "shared_experts", "architecture"}
EXPERT_FIELDS = {"source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"}
DTYPES = ("bfloat16", "float16", "float32")


def read_mergekit(path: str | os.PathLike) -> tuple[dict[str, Any], str | None]:
    """Reads a mergekit MoE configuration.

    Known fields: `base_model`, `gate_mode` (`hidden`, `hidden_avg`, `cheap_embed`, `random`, `uniform_random`),
    `dtype`, `experts_per_token`, and per expert `source_model`, `positive_prompts`, `negative_prompts`, `noise_scale`,
    `residual_scale`. Hidden vectors are taken where the router will see them, not at the layer's input.

    Args:
        path (`str`): YAML file.

    Returns:
        `tuple[dict, str | None]`: Keyword arguments of [`upcycle`], and the dtype to load the models in.

    Raises:
        ValueError: not YAML, an unknown or missing field, or one that has no counterpart (the message says which).

    Example:

    ```python
    >>> recipe, dtype = read_mergekit("moe.yaml")
    >>> moe, report = upcycle(**recipe)
    ```
    """
    path = Path(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{str(path)!r} must hold a mapping with `base_model` and `experts`, got {config!r}.")
    _check_fields(config, FIELDS, str(path))
    experts = config.get("experts")
    if not config.get("base_model") or not isinstance(experts, list) or not experts:
        raise ValueError(f"{str(path)!r} needs `base_model` and a list of `experts`.")
    if config.get("shared_experts"):
        raise ValueError(
            f"{str(path)!r} has `shared_experts`, which are not read; make a shared expert of the base model with "
            "`shared=` of `upcycle`."
        )
    for number, expert in enumerate(experts):
        if not isinstance(expert, Mapping) or not expert.get("source_model"):
            raise ValueError(f"`experts[{number}]` of {str(path)!r} needs a `source_model`, got {expert!r}.")
        _check_fields(expert, EXPERT_FIELDS, f"experts[{number}] of {path}")
    dtype = config.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` of {str(path)!r} must be one of {list(DTYPES)}, got {dtype!r}.")
    top_k = config.get("experts_per_token", 2)
    recipe = {
        "model": config["base_model"],
        "num_experts": len(experts),
        "top_k": top_k,
        "experts": FromModels(
            [expert["source_model"] for expert in experts],
            residual_scales=_scales(experts, "residual_scale", 1.0),
            noise_scales=_scales(experts, "noise_scale", 0.0),
        ),
        "router": _router(config.get("gate_mode", "hidden"), experts, path),
    }
    return recipe, dtype


def _check_fields(given: Mapping, known: set[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; known are {sorted(known)}.")


def _scales(experts: list[Mapping], name: str, default: float) -> list[float] | None:
    if all(expert.get(name) is None for expert in experts):
        return None
    return [default if expert.get(name) is None else float(expert[name]) for expert in experts]


def _router(gate_mode: str, experts: list[Mapping], path: Path) -> RouterInit:
    if gate_mode in ("random", "uniform_random"):
        return Normal()
    if gate_mode not in ("hidden", "hidden_avg", "cheap_embed"):
        raise ValueError(
            f"`gate_mode` of {str(path)!r} must be 'hidden', 'hidden_avg', 'cheap_embed', 'random' or "
            f"'uniform_random', got {gate_mode!r}."
        )
    prompts = {
        number: {"positive": expert.get("positive_prompts") or [], "negative": expert.get("negative_prompts") or []}
        for number, expert in enumerate(experts)
    }
    without = [number for number, entry in prompts.items() if not entry["positive"]]
    if without:
        raise ValueError(
            f"`gate_mode: {gate_mode}` of {str(path)!r} needs `positive_prompts` for each expert; {without} have none."
        )
    return Prompts(prompts, mode=gate_mode)
