"""What one growth has decided, and whether the result computes what the small model did."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from .families import FAMILIES
from .sizes import Sizes, per_layer_lists
from .unit_maps import UnitMap


__all__ = ["Growth", "predict", "warnings_for"]

DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout")


@dataclass(frozen=True)
class Growth:
    """The decisions of one run. Holds no weights.

    Args:
        old, new ([`Sizes`]): Before and after.
        maps (`dict[str, UnitMap]`): Coordinates, by the units of [`Axes`].
        head_map, kv_map ([`UnitMap`]): Heads.
        layers (`list[int]`): Source layer of every layer.
        inserted (`set[int]`): Layers that start without effect.
        width, depth, order (`str`), noise_std (`float`), seed (`int`): As in [`grow_model`].
    """

    old: Sizes
    new: Sizes
    maps: dict[str, UnitMap]
    head_map: UnitMap
    kv_map: UnitMap
    layers: list[int]
    inserted: set[int]
    width: str
    depth: str
    order: str
    noise_std: float
    seed: int

    @property
    def pooled_kv_heads(self) -> int | None:
        """Key-value heads to average the old ones to, `None` where none are lost."""
        return self.new.num_key_value_heads if self.new.num_key_value_heads < self.old.num_key_value_heads else None

    @property
    def widens(self) -> bool:
        """Whether any units are added."""
        return any(not unit_map.is_identity for unit_map in self.maps.values())

    @property
    def deepens(self) -> bool:
        """Whether layers are added."""
        return len(self.layers) > self.old.num_hidden_layers


def predict(growth: Growth, model: PreTrainedModel) -> tuple[bool, str]:
    """Whether the function is preserved up to rounding, and why or why not.

    Args:
        growth ([`Growth`]): The decisions.
        model (`PreTrainedModel`): The small model.

    Returns:
        `tuple[bool, str]`
    """
    config, old, new = model.config, growth.old, growth.new
    why = []
    if not growth.maps["hidden"].is_uniform:
        why.append(
            f"`hidden_size={new.hidden_size}` is no multiple of {old.hidden_size}, so the coordinates of the residual "
            "stream do not occur equally often, which changes what norms measure"
        )
    if growth.pooled_kv_heads is not None:
        why.append(f"{old.num_key_value_heads} key-value heads were averaged to {new.num_key_value_heads}")
    for name, unit_map in (("q_norm", growth.head_map), ("k_norm", growth.kv_map)):
        axes = FAMILIES[config.model_type].get(f"self_attn.{name}")
        if axes is not None and axes.outputs is not None and not unit_map.is_uniform:
            why.append(f"`{name}` is a norm over all heads, and these do not occur equally often")
    if growth.width == "aki" and growth.widens and old.num_hidden_layers > 1:
        why.append("added units are those of the next layer (AKI)")
    if growth.noise_std and growth.widens:
        why.append(f"added units have noise of {growth.noise_std:g} standard deviations")
    if growth.deepens and growth.depth != "identity":
        why.append(f"{new.num_hidden_layers - old.num_hidden_layers} repeated layers act once more")
    elif growth.deepens and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        why.append("attention is scaled by the number of the layer")
    if why:
        return False, "; ".join(why)
    parts = []
    if growth.widens:
        parts.append("copies of a unit share out what it did")
    if growth.deepens:
        parts.append("inserted layers start with zeros in front of the residual stream")
    return True, " and ".join(parts)


def warnings_for(growth: Growth, model: PreTrainedModel, exact: bool, reason: str) -> list[str]:
    """What the user should know before training on."""
    config, found = model.config, []
    if not exact:
        found.append(f"The grown model is not exactly the small one: {reason}.")
    no_dropout = not any(getattr(config, name, 0) for name in DROPOUTS)
    if growth.widens and growth.width == "fpi" and growth.noise_std == 0 and no_dropout:
        found.append(
            '`width="fpi"` without dropout ties the copies of a unit: they get equal gradients for ever, and the '
            'model learns no more than the small one could. Use `width="fpi_uneven"`, `"aki"`, or `noise_std=0.01`.'
        )
    if growth.deepens:
        for name, kinds in per_layer_lists(config, growth.layers).items():
            if len(set(map(str, kinds))) > 1:
                found.append(f"`{name}` differs between layers; a copy keeps the entry of the layer it comes from.")
    return found
