"""`grow_model`: a small dense model in, a larger one of the same class and a report out."""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_moe.upcycling.report import count_parameters, measure_gap
from hf_moe.upcycling.sources import load_source, source_name
from hf_moe.upcycling.statistics import random_batch

from .depth import DEPTHS, depth_map, inserted_layers
from .families import FAMILIES, growable_families
from .prediction import Growth, predict, warnings_for
from .report import GrowthReport
from .sizes import grown_config, grown_sizes, read_sizes
from .unit_maps import ORDERS, UnitMap, grow_heads, grow_units
from .weights import grown_weights
from .width import WIDTHS


__all__ = ["METHODS", "grow_model"]

logger = logging.get_logger(__name__)

#: Width and depth of the methods of bert2BERT (FPI, AKI; it stacks layers) and AquilaMoE.
METHODS = {"fpi": ("fpi", "interpolate"), "aki": ("aki", "stack"), "aki_pro": ("aki", "interpolate")}


def grow_model(
    model: PreTrainedModel | str,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_hidden_layers: int | None = None,
    num_key_value_heads: int | None = None,
    width: str | None = None,
    depth: str | None = None,
    order: str = "cyclic",
    method: str | None = None,
    noise_std: float = 0.0,
    seed: int = 0,
    check: bool = True,
) -> tuple[PreTrainedModel, GrowthReport]:
    r"""Initialises a larger model from a smaller one. The result is an ordinary model of the same class; the small one
    is left as it is.

    [AquilaMoE](https://huggingface.co/papers/2408.06567), Sec. 3.2;
    [bert2BERT](https://huggingface.co/papers/2110.07143), Sec. 3.

    Width growth computes the same function if D is a multiple of the old one; the feed-forward and the heads may
    grow to any size. Repeated layers change the function, except with `depth="identity"`.

    Note: `"fpi_uneven"` is not in the papers. With their `"fpi"` the copies of a unit get equal gradients for ever, so
    that without dropout the larger model never computes more than the small one could.

    Args:
        model (`PreTrainedModel` or `str`): Dense model of one of [`growable_families`], Hub id or folder.
        hidden_size (`int`, *optional*): Width D of the residual stream; what is left out stays as it is.
        intermediate_size (`int`, *optional*): Width I of the feed-forward.
        num_attention_heads (`int`, *optional*): Query heads; their width stays as it is.
        num_hidden_layers (`int`, *optional*): Layers.
        num_key_value_heads (`int`, *optional*): Key-value heads. Fewer are averages of the old ones, which changes
            the function.
        width (`str`, *optional*, defaults to `"fpi_uneven"`): How added units start. `"fpi_uneven"`: copies that share
            their output in random parts; `"fpi"`: in equal parts; `"aki"`: as in the next layer.
        depth (`str`, *optional*, defaults to `"interpolate"`): `"interpolate"`, `"stack"`, or `"identity"` (as
            interpolation, inserted layers start with zeros in front of the residual stream).
        order (`str`, defaults to `"cyclic"`): Which units are copied first: `"cyclic"` or `"random"`.
        method (`str`, *optional*): `"fpi"` (with interpolation), `"aki"` (with stacking), `"aki_pro"` (with
            interpolation), in place of `width` and `depth`.
        noise_std (`float`, defaults to 0.0): Noise on added units, relative to the standard deviation of a matrix;
            0.01 parts the copies of `"fpi"`.
        seed (`int`, defaults to 0): Seed of everything random.
        check (`bool`, defaults to `True`): Run both models and report the largest difference of their logits.

    Returns:
        `tuple[PreTrainedModel, GrowthReport]`: The large model in evaluation mode, and what is known about it.

    Raises:
        ValueError: what cannot work, with the argument, its value and the fix.
        TypeError: an argument of the wrong type.

    Example:

    ```python
    >>> grown, report = grow_model("HuggingFaceTB/SmolLM2-135M-Instruct", hidden_size=1152, intermediate_size=4096)
    >>> moe, _ = upcycle(grown, num_experts=8, top_k=2)  # scale-up, then scale-out
    ```
    """
    width, depth = _width_and_depth(width, depth, method)
    _check_choices(width, depth, order, noise_std, seed)
    name = source_name(model)
    model = load_source(model)
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__} cannot be grown: nothing is known about the axes of {kind!r}. Known are "
            f"{', '.join(growable_families())}."
        )
    wanted = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": num_hidden_layers,
    }
    generator = torch.Generator().manual_seed(seed)
    growth = _decide(model.config, wanted, generator, width, depth, order, float(noise_std), seed)
    config = grown_config(model.config, growth.new, growth.layers)
    exact, reason = predict(growth, model)
    warnings = warnings_for(growth, model, exact, reason)
    for text in warnings:
        logger.warning(text)
    grown = _load(model, config, growth, generator)
    grown.config.growth = {
        "source": name,
        "before": growth.old.to_dict(),
        "after": growth.new.to_dict(),
        **{key: getattr(growth, key) for key in ("width", "depth", "order", "noise_std", "seed", "layers")},
    }
    gap = None
    if check:
        length = max(1, min(128, getattr(config, "max_position_embeddings", None) or 128))
        gap = measure_gap(model, grown, [random_batch(config.vocab_size, seed + 1, length=length)], "random")
        if exact and not gap.is_rounding:
            logger.warning(
                f"The grown model should compute what the small one did, but the {gap.output} differ by "
                f"{gap.max_difference:.3g} (largest {gap.largest:.3g}, {gap.dtype}). Please report this with the "
                "config of the source."
            )
    parameters, num_bytes = count_parameters(grown)
    return grown, GrowthReport(
        source=name,
        architecture=type(grown).__name__,
        before=growth.old.to_dict(),
        after=growth.new.to_dict(),
        width=width,
        depth=depth,
        order=order,
        noise_std=noise_std,
        seed=seed,
        depth_map=growth.layers,
        head_map=growth.head_map.index.tolist(),
        predicted_exact=exact,
        reason=reason,
        dense_parameters=count_parameters(model)[0],
        parameters=parameters,
        num_bytes=num_bytes,
        measured=gap,
        warnings=warnings,
    )


def _width_and_depth(width: str | None, depth: str | None, method: str | None) -> tuple[str, str]:
    if method is None:
        return width or WIDTHS[0], depth or DEPTHS[0]
    if method not in METHODS:
        raise ValueError(f"`method` must be None or one of {list(METHODS)}, got {method!r}.")
    of_method = METHODS[method]
    for name, given, meant in zip(("width", "depth"), (width, depth), of_method, strict=True):
        if given is not None and given != meant:
            raise ValueError(
                f"`method={method!r}` means `{name}={meant!r}`, got `{name}={given!r}`. Leave one of them out."
            )
    return of_method


def _check_choices(width: Any, depth: Any, order: Any, noise_std: Any, seed: Any) -> None:
    for name, value, allowed in (("width", width, WIDTHS), ("depth", depth, DEPTHS), ("order", order, ORDERS)):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")
    if isinstance(noise_std, bool) or not isinstance(noise_std, (int, float)) or not 0 <= noise_std < math.inf:
        raise ValueError(f"`noise_std` must be a number of at least 0, got {noise_std!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")


def _decide(
    config: Any,
    wanted: dict[str, int | None],
    generator: torch.Generator,
    width: str,
    depth: str,
    order: str,
    noise_std: float,
    seed: int,
) -> Growth:
    """Sizes and maps; refuses what cannot be grown."""
    old, new = read_sizes(config), grown_sizes(config, **wanted)
    # Fewer key-value heads are made first, by averaging; from there on there is only growth.
    pooled = min(old.num_key_value_heads, new.num_key_value_heads)
    heads, kv_heads = grow_heads(
        old.num_attention_heads, pooled, new.num_attention_heads, new.num_key_value_heads, order, generator
    )
    hidden = grow_units(old.hidden_size, new.hidden_size, order, generator)
    inner = grow_units(old.intermediate_size, new.intermediate_size, order, generator)
    queries, keys = heads.blocks(old.head_dim), kv_heads.blocks(old.head_dim)
    layers = depth_map(old.num_hidden_layers, new.num_hidden_layers, depth)
    return Growth(
        old=old,
        new=new,
        maps={
            "hidden": hidden,
            "inner": inner,
            "heads": queries,
            "kv": keys,
            "qkv": UnitMap.joined(queries, keys, keys),
            "head_qkv": heads.blocks(3 * old.head_dim),
            "gate_up": UnitMap.joined(inner, inner),
        },
        head_map=heads,
        kv_map=kv_heads,
        layers=layers,
        inserted=inserted_layers(layers) if depth == "identity" else set(),
        width=width,
        depth=depth,
        order=order,
        noise_std=noise_std,
        seed=seed,
    )


def _load(model: PreTrainedModel, config: Any, growth: Growth, generator: torch.Generator) -> PreTrainedModel:
    """The large model. It keeps the very tensors it is given, so the peak is both models and one matrix."""
    cls: type[PreTrainedModel] = type(model)
    with torch.device("meta"):
        skeleton: nn.Module = cls(config)
    weights = grown_weights(model, skeleton, growth, generator)
    loaded: Any = cls.from_pretrained(
        None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
    )
    grown, info = loaded
    lacking = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if lacking:
        raise ValueError(f"{cls.__name__} has weights growth knows nothing about: {', '.join(lacking[:4])}.")
    grown.config.name_or_path = ""
    if getattr(model, "generation_config", None) is not None:
        grown.generation_config = copy.deepcopy(model.generation_config)
    return grown.to(model.device).eval()
