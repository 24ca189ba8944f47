"""The router anchor (SEUF, Eq. 4): keeps the routers of the target experts on them while they unlearn.

Shapes: T tokens, N experts, K per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_moe.attribution import dense_weights
from hf_moe.views import MoeLayerView, Routing, in_backward, moe_layers, record_routing


__all__ = ["RouterAnchor", "anchor_loss", "has_constant_weights"]


def anchor_loss(gates: torch.Tensor, targets: list[int], token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """L = mean over tokens of || g - a ||^2, where a is 1 for the targets and 0 for other experts.

    Args:
        gates (`torch.Tensor` of shape `(T, N)`): Routing weights, or probabilities.
        targets (`list[int]`): Target experts.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): `False` on padding, which is left out.

    Returns:
        `torch.Tensor`: A scalar.
    """
    wanted = torch.zeros(gates.shape[-1], device=gates.device)
    wanted[targets] = 1.0
    distance = (gates.float() - wanted).square().sum(dim=-1)  # (T,)
    if token_mask is None:
        return distance.mean()
    return (distance * token_mask).sum() / token_mask.sum().clamp_min(1)


class RouterAnchor:
    """Reads the routers of the target layers during forward passes, with their graph.

    Args:
        model (`nn.Module`): The model that trains.
        targets (`dict[str, list[int]]`): Target experts by layer name.
        on (`str`): `"weights"` or `"probs"`.
    """

    def __init__(self, model: nn.Module, targets: dict[str, list[int]], on: str):
        self.on = on
        self.targets = targets
        self.views: list[MoeLayerView] = [view for view in moe_layers(model) if view.name in targets]
        self._routed: dict[str, Routing] = {}
        self._active = self._attached = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has its hooks on the routers while the block runs; a block inside another changes nothing. A model that is
        compiled inside the block is compiled with them."""
        if self._attached:
            yield
            return
        handles = []
        self._attached = True
        try:
            for view in self.views:
                handles.append(view.router.register_forward_hook(partial(self._after_router, view)))
            yield
        finally:
            self._attached = False
            for handle in handles:
                handle.remove()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keeps what the routers decide while the block runs."""
        self._routed = {}
        self._active = True
        try:
            with self.attached():
                yield
        finally:
            self._active = False

    def _after_router(self, view: MoeLayerView, _module: nn.Module, _args: tuple, output: Any) -> None:
        if self._active and not in_backward():
            self._routed[view.name] = view.read(output)

    def loss(self, token_mask: torch.Tensor | None) -> torch.Tensor:
        """The anchor of what was read, summed over the target layers; forgets it.

        Args:
            token_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 on padding.

        Returns:
            `torch.Tensor`: A scalar.

        Raises:
            ValueError: a router did not run, or ran without a graph.
        """
        mask = None if token_mask is None else token_mask.reshape(-1).bool()
        losses = []
        for view in self.views:
            routing = self._routed.pop(view.name, None)
            if routing is None:
                raise ValueError(
                    f"The router of the target layer {view.name!r} was not seen to run: its anchor would be missing. "
                    "A model that was compiled before the trainer was made does that: compile it with `torch_compile`."
                )
            gates = self.gates(view, routing)
            if torch.is_grad_enabled() and not gates.requires_grad:
                raise ValueError(
                    f"The router of the target layer {view.name!r} ran without a graph: its anchor would silently "
                    "be dropped. Reentrant checkpointing does that: use `{'use_reentrant': False}`."
                )
            losses.append(anchor_loss(gates, self.targets[view.name], mask))
        return torch.stack(losses).sum()

    def gates(self, view: MoeLayerView, routing: Routing) -> torch.Tensor:
        """What is anchored, `(T, N)`."""
        if self.on == "probs":
            return view.probabilities(routing.router_logits)
        return dense_weights(view, routing)


@torch.no_grad()
def has_constant_weights(model: nn.Module, view: MoeLayerView, batch: dict[str, torch.Tensor]) -> bool:
    """Whether a layer sends each token to one expert with a weight that is always the same (top-1, renormalised): the
    weights then say nothing about the router and have gradient 0.

    Args:
        model (`nn.Module`): The model.
        view ([`~hf_moe.views.MoeLayerView`]): One of its layers.
        batch (`dict[str, torch.Tensor]`): A batch to try it with.

    Returns:
        `bool`
    """
    if view.num_experts_per_tok != 1:
        return False
    with record_routing(model) as recorder:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    weights = recorder.layers[view.index].top_k_weights[0][batch["attention_mask"].reshape(-1).bool()].float()
    return bool(weights.max() - weights.min() < 1e-5)
