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

from hf_moe.routing import BaseRouter, LayerRouting, RouterOutput
from hf_moe.routing.discovery import find_balancers
from hf_moe.routing.load_balancer import PendingBalance
from hf_moe.views import unwrap_model


__all__ = ["RouterLossCollector"]


class RouterLossCollector:
    """Starts the balance losses of every decoder pass inside [`~RouterLossCollector.collect`].

    Its hooks are inert outside that context, in evaluation and without gradients: reference models, passes with
    disabled adapters and metrics are not collected. Activation checkpointing repeats layers during the backward pass,
    which lies outside too.

    Args:
        model (`nn.Module`): A model of hf_moe, bare or wrapped by PEFT.

    Raises:
        ValueError: the model has no [`~hf_moe.LoadBalancer`].
    """

    def __init__(self, model: nn.Module):
        self.model: Any = unwrap_model(model)
        self.balancers = find_balancers(self.model)
        if not self.balancers:
            raise ValueError(
                f"{type(self.model).__name__} has no `LoadBalancer`, so this trainer has no router losses to add. "
                "Use a model of hf_moe (`hf_moe.upcycle` makes one), or the stock trainer of the same name."
            )
        self._active = False
        self._pending: list[PendingBalance] = []
        self._attention_mask: torch.Tensor | None = None
        # What each router returned in this pass, by balancer and position.
        self._outputs: dict[str, dict[int, RouterOutput]] = {name: {} for name in self.balancers}
        # Hooks stay for good: adding and removing them would make a compiled model compile again in every step.
        for name, (_, routers) in self.balancers.items():
            for position, router in enumerate(routers):
                router.register_forward_hook(partial(self._after_router, name, position))
        self.model.base_model.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        self.model.base_model.register_forward_hook(self._after_decoder)

    @contextmanager
    def collect(self) -> Iterator[list[PendingBalance]]:
        """Collects while the block runs; the model's own `forward` then adds no router loss.

        Yields:
            `list[PendingBalance]`: One per decoder pass with gradients (and per balancer of the model), filled while
            the block runs. Each has begun its sum over ranks, and must be finished on every rank.
        """
        pending: list[PendingBalance] = []
        self._pending, self._active = pending, True
        vars(self.model)["adds_router_losses"] = False
        try:
            yield pending
        finally:
            self._active, self._pending = False, []
            self._clear()
            vars(self.model).pop("adds_router_losses")  # back to what its class says

    def _after_router(self, name: str, position: int, router: BaseRouter, _args: tuple, output: RouterOutput) -> None:
        if self._active and router.training and torch.is_grad_enabled():
            self._outputs[name][position] = output

    def _before_decoder(self, _module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        if self._active:
            self._clear()
            mask = kwargs.get("attention_mask")
            self._attention_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def _after_decoder(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        if not self._active:
            return
        for name, (balancer, routers) in self.balancers.items():
            outputs = self._outputs[name]
            if not outputs:
                continue
            layers = [
                LayerRouting.from_router(routers[at], outputs[at].router_logits, outputs[at].top_k_index)
                for at in sorted(outputs)
            ]
            mask = self._attention_mask
            if mask is not None and mask.numel() != layers[0].index.shape[0]:
                mask = None  # it describes something else, e.g. the text of a tower that sees images
            self._pending.append(balancer.begin(layers, mask))
        self._clear()

    def _clear(self) -> None:
        for outputs in self._outputs.values():
            outputs.clear()
        self._attention_mask = None
