"""The sizes growth changes: read from a config, checked, and written into a new one."""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from .families import DERIVED_HEAD_DIM


__all__ = ["Sizes", "grown_config", "grown_sizes", "read_sizes"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder.

    Args:
        hidden_size, intermediate_size (`int`): D and I.
        num_attention_heads, num_key_value_heads, head_dim (`int`): Heads, and the width of one.
        num_hidden_layers (`int`): Layers.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int

    def to_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


def read_sizes(config: PreTrainedConfig) -> Sizes:
    """The sizes of a dense model."""
    heads = config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Sizes(
        hidden_size=config.hidden_size,
        intermediate_size=inner or 4 * config.hidden_size,  # GPT-2
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        num_hidden_layers=config.num_hidden_layers,
    )


def grown_sizes(config: PreTrainedConfig, **wanted: int | None) -> Sizes:
    """The sizes after growth; what is `None` stays as it is.

    Args:
        config (`PreTrainedConfig`): Of the small model.
        **wanted: `hidden_size`, `intermediate_size`, `num_attention_heads`, `num_key_value_heads`,
            `num_hidden_layers`.

    Returns:
        [`Sizes`]

    Raises:
        ValueError: a size below the source's, nothing to grow, or a combination the family cannot have.
        TypeError: not a whole number.
    """
    old = read_sizes(config)
    given = {name: value for name, value in wanted.items() if value is not None}
    if not given:
        raise ValueError(f"nothing to grow: pass at least one of {', '.join(f'`{name}`' for name in wanted)}.")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
        if name != "num_key_value_heads" and value < getattr(old, name):
            raise ValueError(
                f"`{name}` must be at least the {getattr(old, name)} of the model, got {value}: growth only adds. "
                "Leave it out to keep it."
            )
    new = replace(old, **given)
    if config.model_type in DERIVED_HEAD_DIM:
        new = _derived_heads(config.model_type, old, new, given)
    else:
        _check_kv_heads(old.num_key_value_heads, new.num_key_value_heads)
    if new == old:
        raise ValueError(f"nothing to grow: the model has these sizes already ({given}).")
    return new


def _derived_heads(model_type: str, old: Sizes, new: Sizes, given: dict[str, int]) -> Sizes:
    if "num_key_value_heads" in given:
        raise ValueError(
            f"`num_key_value_heads` is not a size of {model_type!r}, which has as many as query heads; leave it out."
        )
    heads = new.hidden_size // old.head_dim
    if new.hidden_size % old.head_dim or given.get("num_attention_heads", heads) != heads:
        possible = given.get("num_attention_heads", -(-new.hidden_size // old.head_dim))
        raise ValueError(
            f"{model_type!r} derives the width of a head, {old.head_dim} here, from `hidden_size / "
            f"num_attention_heads`, so both must grow together; got {new.hidden_size} and "
            f"{given.get('num_attention_heads', 'none')}. Use `hidden_size={possible * old.head_dim}` with "
            f"`num_attention_heads={possible}`."
        )
    return replace(new, num_attention_heads=heads, num_key_value_heads=heads)


def _check_kv_heads(old: int, new: int) -> None:
    if new < 1 or (new < old and old % new):
        divisors = [n for n in range(1, old + 1) if old % n == 0]
        raise ValueError(
            f"`num_key_value_heads` must be at least the {old} of the model, or divide them (groups of heads are then "
            f"averaged, which changes the function), got {new}. Fewer can be: {divisors}."
        )


def grown_config(config: PreTrainedConfig, sizes: Sizes, layers: list[int]) -> PreTrainedConfig:
    """The config of the grown model: sizes written, the head size stated, lists of layers re-indexed.

    Args:
        config (`PreTrainedConfig`): Of the small model; stays as it is.
        sizes ([`Sizes`]): Of the large one.
        layers (`list[int]`): Source layer of every layer.

    Returns:
        `PreTrainedConfig`

    Raises:
        ValueError: the family refuses the sizes.
    """
    names = dict(sizes.to_dict())
    if config.model_type in DERIVED_HEAD_DIM:
        del names["head_dim"], names["num_key_value_heads"]
    if not hasattr(config, "intermediate_size"):  # GPT-2
        names["n_inner"] = names.pop("intermediate_size")
    fields: dict[str, Any] = {**copy.deepcopy(config.to_dict()), **per_layer_lists(config, layers)}
    fields |= {config.attribute_map.get(name, name): value for name, value in names.items()}
    try:
        grown = type(config).from_dict(fields)
    except Exception as error:  # `@strict` wraps what a config's own checks raise
        why = error.__cause__ or error
        raise ValueError(f"{type(config).__name__} refuses these sizes: {why} They are {names}.") from error
    grown.name_or_path = ""
    return grown


def per_layer_lists(config: PreTrainedConfig, layers: list[int]) -> dict[str, list]:
    """Fields with one entry per layer (`layer_types`, `no_rope_layers`, ...), re-indexed."""
    old = config.num_hidden_layers
    return {
        name: [value[layer] for layer in layers]
        for name, value in config.to_dict().items()
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == old
    }
