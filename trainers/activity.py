"""Experts in use during training: how many per token, and what they cost.

Shapes: T tokens, L MoE layers, K per token.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn

from hf_moe.routing.balance import flat_mask
from hf_moe.views import moe_layers


__all__ = ["ActivityMeter"]


class ActivityMeter:
    """Adds up the experts in use over training passes, on the device: nothing waits for it until it is read.

    Args:
        model (`nn.Module`): The model; where [`~hf_moe.moe_layers`] cannot find its experts, costs are not counted.
        routers (`Mapping[Hashable, nn.Module]`): Its routers, under the names that `note` will use.
    """

    def __init__(self, model: nn.Module, routers: Mapping[Hashable, Any]):
        #: By router: experts of any kind (the next number marks an empty slot), those that compute, the size of one.
        self.layers: dict[Hashable, tuple[int, int, int]] = {}
        #: Parameters of all routed experts.
        self.num_routed = 0
        try:
            views = moe_layers(model)
        except ValueError:  # blocks of somebody else's making
            views = []
        sizes: dict[int, tuple[int, int, int]] = {}
        for view in views:
            size = sum(parameter.numel() for parameter in view.experts.parameters())
            self.num_routed += size
            computing = view.num_computing_experts
            for module in view.router.modules():  # PEFT may have wrapped it
                sizes[id(module)] = (view.num_experts, computing, size // max(computing, 1))
        for name, router in routers.items():
            if id(router) in sizes or hasattr(router, "num_experts"):
                self.layers[name] = sizes.get(id(router)) or (router.num_experts, router.num_experts, 0)
        #: Passes that were counted, and not yet asked for.
        self.num_passes = 0
        self._slots: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None
        self._parameters: torch.Tensor | None = None

    def note(self, decisions: Mapping[Hashable, torch.Tensor], token_mask: torch.Tensor | None = None) -> None:
        """Counts one pass.

        Args:
            decisions (`Mapping`): By name of a router, its `top_k_index` `(T, K)`.
            token_mask (`torch.Tensor` of T elements, *optional*): `False` on padding.
        """
        slots, tokens, parameters = [], [], []
        for router, index in decisions.items():
            if router not in self.layers:
                continue
            num_experts, computing, size = self.layers[router]
            used = (index < num_experts).sum(dim=-1)  # (T,)
            mask = None if token_mask is None else flat_mask(token_mask, index.shape[0]).to(index.device)
            slots.append((used if mask is None else used * mask).sum())
            tokens.append(used.new_full((), used.numel()) if mask is None else mask.sum())
            parameters.append((index < computing).sum() * size)
        if not slots:
            return
        self.num_passes += 1
        self._slots = _add(self._slots, slots)
        self._tokens = _add(self._tokens, tokens)
        self._parameters = _add(self._parameters, parameters)

    def drain_means(self) -> torch.Tensor | None:
        """Slots in use and tokens times layers since the last call, `(2,)`; `None` where nothing was counted."""
        if self._slots is None or self._tokens is None:
            return None
        found = torch.stack([self._slots, self._tokens])
        self._slots = self._tokens = None
        return found

    def take_parameters(self) -> torch.Tensor | None:
        """Expert parameters that tokens went through since the last call, 0-dim; `None` where nothing was counted."""
        found, self._parameters, self.num_passes = self._parameters, None, 0
        return found


def _add(total: torch.Tensor | None, parts: list[torch.Tensor]) -> torch.Tensor:
    device = parts[0].device if total is None else total.device
    new = torch.stack([part.detach().to(device) for part in parts]).sum()
    return new if total is None else total + new
