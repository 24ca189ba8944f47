"""Which experts the weak stream uses: `"rank:2"`, `"top:1"`, `"random:1"`."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


__all__ = ["WEAK_KINDS", "WEAK_WEIGHTS", "WeakRouting", "parse_weak"]

WEAK_KINDS = ("rank", "top", "random")
WEAK_WEIGHTS = ("native", "renormalised")


@dataclass(frozen=True)
class WeakRouting:
    """A weak activation of https://huggingface.co/papers/2405.14507.

    Args:
        kind (`str`): `"rank"`: one expert, the `number`-th best, counted from 1 as in the paper; `"top"`: the `number`
            best; `"random"`: `number` distinct experts per token and layer, drawn uniformly.
        number (`int`): At least 1.
        weights (`str`, *optional*, defaults to `"native"`): `"native"`: mixing weights as the model's own router makes
            them of its selection; `"renormalised"`: divided by their sum.

    Example:
        ```python
        parse_weak("rank:2").check(hf_moe.moe_layers(model))
        ```
    """

    kind: str
    number: int
    weights: str = "native"

    def check(self, layers: Sequence[Any]) -> None:
        """Refuses a choice that a layer cannot make.

        Args:
            layers (`Sequence` of [`~hf_moe.views.MoeLayerView`]): The model's MoE layers.

        Raises:
            ValueError: A layer has fewer than `number` experts.
        """
        smallest = min(layers, key=lambda layer: layer.num_experts)
        if self.number > smallest.num_experts:
            raise ValueError(
                f'`weak="{self.kind}:{self.number}"` needs {self.number} experts, and `{smallest.name}` has '
                f"{smallest.num_experts}. The number must be between 1 and {smallest.num_experts}."
            )

    @property
    def selection(self) -> dict[str, Any]:
        """The same, as an argument of [`~hf_moe.routing_override`], which counts ranks from 0."""
        return {
            "rank": {"ranks": [self.number - 1]},
            "top": {"top_m": self.number},
            "random": {"random": self.number},
        }[self.kind]

    def override(
        self, model: nn.Module, rows: slice | None = None, generator: torch.Generator | None = None
    ) -> AbstractContextManager:
        """The context in which `model` routes this way.

        Args:
            model (`nn.Module`): A model accepted by [`~hf_moe.moe_layers`].
            rows (`slice`, *optional*): Batch rows that do; the others keep their own routing. All by default.
            generator (`torch.Generator`, *optional*): Source of the random experts.

        Returns:
            `AbstractContextManager`
        """
        from hf_moe.routing_override import routing_override

        weights: Any = self.weights
        generator = generator if self.kind == "random" else None
        return routing_override(model, **self.selection, weights=weights, rows=rows, generator=generator)


def parse_weak(weak: str, weights: str = "native") -> WeakRouting:
    """Read a weak activation.

    Args:
        weak (`str`): `"rank:k"`, `"top:m"` or `"random:r"`, the numbers counted from 1.
        weights (`str`, *optional*, defaults to `"native"`): See [`WeakRouting`].

    Returns:
        [`WeakRouting`]

    Raises:
        TypeError: `weak` is no string.
        ValueError: An argument has another form.

    Example:
        ```python
        >>> parse_weak("rank:2")
        WeakRouting(kind='rank', number=2, weights='native')
        ```
    """
    if not isinstance(weak, str):
        raise TypeError(f'`weak` must be a string such as "rank:2", got {weak!r}.')
    match = re.fullmatch(r"(rank|top|random):([1-9]\d*)", weak)
    if match is None:
        raise ValueError(
            f'`weak` must be "rank:k" (the k-th best expert, from 1), "top:m" (the m best) or "random:r" (r random '
            f"experts), got {weak!r}."
        )
    if weights not in WEAK_WEIGHTS:
        raise ValueError(f"`weak_weights` must be one of {list(WEAK_WEIGHTS)}, got {weights!r}.")
    return WeakRouting(match[1], int(match[2]), weights)
