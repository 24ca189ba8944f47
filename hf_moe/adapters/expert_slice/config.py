"""Which experts to train."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_moe.adapters.core import MoeAdapterConfig


__all__ = ["ExpertSliceConfig"]


@dataclass
class ExpertSliceConfig(MoeAdapterConfig):
    """Configuration of an adapter that trains given routed experts of given layers in full, and nothing else.

    Stacked experts are one parameter per layer, so no name addresses one of them. The adapter holds copies of the
    chosen slices (and of the router); gradients and optimizer state exist for these copies only. Before training, and
    with the adapter disabled, the model computes what it did. `merge_and_unload()` writes the slices back, and the
    result saves as an ordinary checkpoint of its family. Works with every family of [`~hf_moe.moe_layers`].

    Args:
        layers (`dict[str | int, list[int]]`): Numbers of the experts to train by MoE layer: its name as in
            [`~hf_moe.moe_layers`] (`"model.layers.3.mlp"`) or its position among the MoE layers (saved as the name).
        train_router (`bool`, defaults to `True`): Also train the routers of these layers. Selection biases are never
            trained: no gradient reaches them.

    Raises:
        ValueError: `layers` is empty, lists no expert for a layer, or one twice or below 0.
        TypeError: `layers` is no mapping to lists of numbers.

    Example:
        ```python
        config = hf_moe.ExpertSliceConfig(layers={"model.layers.11.mlp": [3]})
        model = peft.get_peft_model(model, config)
        ```
    """

    type_name = "HFMOE_EXPERT_SLICE"

    layers: dict[str, list[int]] = field(default_factory=dict)
    train_router: bool = True

    def validate(self) -> None:
        """Checks `layers`, and brings it into the form that JSON keeps."""
        layers: Any = self.layers
        if not isinstance(layers, Mapping):
            raise TypeError(f"`layers` must map layers to lists of expert numbers, got {type(layers).__name__}.")
        if not layers:
            raise ValueError(
                '`layers` must name the experts to train, e.g. `layers={"model.layers.3.mlp": [5]}`, got none. '
                "`hf_moe.attribute_experts(model, data).targets()` finds them."
            )
        clean: dict[str, list[int]] = {}
        for name, experts in layers.items():
            if isinstance(experts, (str, bytes)) or not hasattr(experts, "__iter__"):
                raise TypeError(f"`layers[{name!r}]` must be a list of expert numbers, got {experts!r}.")
            numbers = [int(expert) for expert in experts]
            if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
                raise ValueError(f"`layers[{name!r}]` must be different numbers from 0 on, got {numbers}.")
            clean[str(name)] = sorted(numbers)
        self.layers = clean
