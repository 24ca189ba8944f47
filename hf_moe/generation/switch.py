"""Weak routing that is turned on and off for every forward pass, at the price of one hook per layer and generation.

[`~hf_moe.routing_override`] says what the routing is, in general; entering it twice per token would cost more than the
routing itself, and in fused mode the weak rows are simply the second half of the tokens.

Shapes: T tokens, N experts, K per token, K' with the weak routing.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from hf_moe.view_selection import Selector, make_selector
from hf_moe.view_slots import fill_slots, skips_empty_slots
from hf_moe.views import MoeLayerView, Routing, is_compiled

from .weak import WeakRouting


__all__ = ["WeakSwitch"]


class WeakSwitch:
    """Context manager that puts hooks on the routers; calling it gives the context in which they do something.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        layers (`Sequence` of [`MoeLayerView`]): Its MoE layers.
        routing ([`WeakRouting`]): What the weak rows do.
        second_half (`bool`): Whether only the second half of the batch is weak.
        generator (`torch.Generator`, *optional*): Source of random experts.

    Example:
        ```python
        with WeakSwitch(model, moe_layers(model), parse_weak("rank:2"), second_half=False) as weak:
            strong = model(**inputs).logits
            with weak():
                worse = model(**inputs).logits
        ```
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[MoeLayerView],
        routing: WeakRouting,
        second_half: bool,
        generator: torch.Generator | None = None,
    ):
        self.model, self.layers, self.second_half = model, layers, second_half
        self.renormalise = routing.weights == "renormalised"
        selection: dict[str, Any] = dict.fromkeys(("ranks", "top_m", "random", "threshold", "fn"))
        self.selector: Selector = make_selector(
            list(layers), **{**selection, **routing.selection, "generator": generator}
        )
        self._on = self._compiled = False
        self._stack = ExitStack()

    def __enter__(self) -> "WeakSwitch":
        self._compiled = is_compiled(self.model)
        with ExitStack() as stack:
            for view in self.layers:
                handle = view.router.register_forward_hook(self._hook(view), with_kwargs=True)
                stack.callback(handle.remove)
                if self.second_half:
                    stack.enter_context(skips_empty_slots(view))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context in which the weak rows are weak."""
        with ExitStack() as stack:
            if self._compiled:  # compiled code ignores hooks that came later
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._on = True
            try:
                yield
            finally:
                self._on = False

    def _hook(self, view: MoeLayerView):
        def rewrite(_router: Any, args: tuple, kwargs: dict, output: Any) -> Any:
            if not self._on:
                return None
            native = view.read(output)
            if not self.second_half:
                weights, index = self._select(view, native, args, kwargs, None)
                return view.write(output, *fill_slots(view, native, weights, index))
            half = native.router_logits.shape[0] // 2
            strong, weak = (Routing(*(tensor[rows] for tensor in native)) for rows in (slice(half), slice(half, None)))
            weights, index = self._select(view, weak, args, kwargs, slice(half, None))
            slots = max(strong.top_k_index.shape[-1], index.shape[-1])
            weights, index = fill_slots(view, weak, *_pad(view, weights, index, slots))
            strong_weights, strong_index = strong.top_k_weights, strong.top_k_index
            if strong_index.shape[-1] < slots:
                strong_weights, strong_index = fill_slots(
                    view, strong, *_pad(view, strong_weights, strong_index, slots)
                )
            return view.write(output, torch.cat([strong_weights, weights]), torch.cat([strong_index, index]))

        return rewrite

    def _select(
        self, view: MoeLayerView, routing: Routing, args: tuple, kwargs: dict, tokens: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, index = self.selector(view, routing, args, kwargs, tokens)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return weights.to(routing.top_k_weights.dtype), index


def _pad(
    view: MoeLayerView, weights: torch.Tensor, index: torch.Tensor, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    missing = slots - index.shape[-1]
    if not missing:
        return weights, index
    return F.pad(weights, (0, missing)), F.pad(index, (0, missing), value=view.num_experts)
