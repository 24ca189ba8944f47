"""Router losses of a model, whatever runs on top of its decoder.

TRL's trainers never call a model's head: they call the decoder and multiply by the head's weights themselves. What a
head adds to its loss is then lost, so it is collected one level below, where every path comes by.

Shapes: T tokens, N experts, K per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_moe.routing import LayerRouting, LoadBalancer
from hf_moe.routing.discovery import find_balancers
from hf_moe.routing.load_balancer import PendingBalance
from hf_moe.views import MoeLayerView, moe_layers, unwrap_model

from .activity import ActivityMeter


__all__ = ["RouterLossCollector"]


class RouterLossCollector:
    """Starts the balance losses of every decoder pass inside [`~RouterLossCollector.collect`], and counts the experts
    in use.

    Its hooks are inert outside that context, in evaluation and without gradients: reference models, passes with
    disabled adapters and metrics are not collected. Activation checkpointing repeats layers during the backward pass,
    which lies outside too.

    A model of transformers has no load balancer; it is given one, `model.load_balancer`, whose buffers are not saved.

    Args:
        model (`nn.Module`): A model of hf_moe, or one accepted by [`~hf_moe.moe_layers`], bare or wrapped by PEFT.

    Raises:
        ValueError: the model has no MoE layer, or is of a family without a rule; see [`~hf_moe.moe_layers`].
    """

    def __init__(self, model: nn.Module):
        self.model: Any = unwrap_model(model)
        self.balancers = find_balancers(self.model)
        #: Layers of a model of transformers; those of hf_moe are known by their routers.
        self.views: list[MoeLayerView] = []
        if not any(routers for _, routers in self.balancers.values()):
            self.views = moe_layers(self.model)
            if not self.balancers:
                device = next(self.model.parameters()).device
                self.model.load_balancer = LoadBalancer([view.num_experts for view in self.views]).to(device)
            self.balancers = {name: (balancer, []) for name, (balancer, _) in find_balancers(self.model).items()}
        self._active = self._wants_losses = False
        self._pending: list[PendingBalance] = []
        self._attention_mask: dict[str, torch.Tensor | None] = {}
        # What each router returned in this pass, by balancer and position.
        self._outputs: dict[str, dict[int, Any]] = {name: {} for name in self.balancers}
        # Hooks stay for good: adding and removing them would make a compiled model compile again in every step.
        named = {}
        for name, (_, routers) in self.balancers.items():
            for position, router in enumerate(routers or [view.router for view in self.views]):
                router.register_forward_hook(partial(self._after_router, name, position))
                named[name, position] = router
        self.activity = ActivityMeter(self.model, named)
        # A tower, or one side of an encoder-decoder model, has a mask of its own; what lies around the base model is
        # not called by every trainer.
        base = self.model.base_model
        below = {id(module) for module in base.modules()} - {id(base)}
        for name in self.balancers:
            home = self.model.get_submodule(name.rpartition(".")[0])
            place: Any = home if id(home) in below else base
            place.register_forward_pre_hook(partial(self._before_decoder, name), with_kwargs=True)
            place.register_forward_hook(partial(self._after_decoder, name))

    @contextmanager
    def collect(self, losses: bool = True) -> Iterator[list[PendingBalance]]:
        """Collects while the block runs; the model's own `forward` then adds no router loss.

        Args:
            losses (`bool`, defaults to `True`): Else experts are counted and nothing more.

        Yields:
            `list[PendingBalance]`: One per decoder pass with gradients (and per balancer of the model), filled while
            the block runs. Each has begun its sum over ranks, and must be finished on every rank.
        """
        pending: list[PendingBalance] = []
        self._pending, self._active, self._wants_losses = pending, True, losses
        vars(self.model)["adds_router_losses"] = False
        try:
            yield pending
        finally:
            self._active, self._pending = False, []
            self._clear()
            vars(self.model).pop("adds_router_losses")  # back to what its class says

    def _after_router(self, name: str, position: int, router: nn.Module, _args: tuple, output: Any) -> None:
        if self._active and router.training and torch.is_grad_enabled():
            self._outputs[name][position] = output

    def _before_decoder(self, name: str, _module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        if self._active:
            self._outputs[name].clear()
            mask = kwargs.get("attention_mask")
            self._attention_mask[name] = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def _after_decoder(self, name: str, _module: nn.Module, _args: tuple, _output: Any) -> None:
        outputs = self._outputs[name]
        if not self._active or not outputs:
            return
        mask = self._attention_mask.pop(name, None)
        decisions = {position: self._index(position, outputs[position]) for position in sorted(outputs)}
        if mask is not None and mask.numel() != next(iter(decisions.values())).shape[0]:
            mask = None  # it describes something else, e.g. the text of a tower that sees images
        self.activity.note({(name, position): index for position, index in decisions.items()}, mask)
        if self._wants_losses:
            layers = [self._layer(name, position, outputs[position]) for position in decisions]
            self._pending.append(self.balancers[name][0].begin(layers, mask))
        outputs.clear()

    def _index(self, position: int, output: Any) -> torch.Tensor:
        return self.views[position].read(output).top_k_index if self.views else output.top_k_index

    def _layer(self, name: str, position: int, output: Any) -> LayerRouting:
        if not self.views:
            router = self.balancers[name][1][position]
            return LayerRouting.from_router(router, output.router_logits, output.top_k_index, output.penalty)
        view = self.views[position]
        routing = view.read(output)
        return LayerRouting(routing.router_logits.float(), routing.top_k_index, view.probabilities)

    def _clear(self) -> None:
        for outputs in self._outputs.values():
            outputs.clear()
        self._attention_mask.clear()
