"""Records what the routers of a model decide.

Shapes: T tokens, N experts, K per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .view_layer import MoeLayerView
from .view_search import moe_layers


__all__ = ["LayerRecord", "RoutingRecorder", "in_backward", "is_compiled", "record_routing"]


def in_backward() -> bool:
    """Whether autograd is running a backward pass, which is where activation checkpointing calls routers again."""
    # There is no public way to ask; the id is -1 outside `backward` and holds for both kinds of checkpointing.
    return torch._C._current_graph_task_id() != -1


@dataclass
class LayerRecord:
    """What one router decided, one entry per call, in the order of the calls. See [`Routing`] for the shapes."""

    view: MoeLayerView
    router_logits: list[torch.Tensor] = field(default_factory=list)
    top_k_weights: list[torch.Tensor] = field(default_factory=list)
    top_k_index: list[torch.Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets what was recorded."""
        for tensors in (self.router_logits, self.top_k_weights, self.top_k_index):
            tensors.clear()


@dataclass
class RoutingRecorder:
    """What [`record_routing`] yields: one [`LayerRecord`] per MoE layer."""

    layers: list[LayerRecord]

    def clear(self) -> None:
        """Forgets what was recorded, so that a loop over batches holds one batch at a time."""
        for layer in self.layers:
            layer.clear()


@contextmanager
def record_routing(model: nn.Module, *, offload: bool = False) -> Iterator[RoutingRecorder]:
    """Records every routing decision made inside the `with` block; nests, and removes its hooks on every exit.

    Calls that activation checkpointing repeats during the backward pass are not recorded a second time. A model that
    `torch.compile` has seen runs uncompiled inside the block: its compiled code ignores hooks that came later.

    Args:
        model (`nn.Module`): A model accepted by [`moe_layers`].
        offload (`bool`, defaults to `False`): Move what is recorded to the CPU at once.

    Yields:
        [`RoutingRecorder`]: Detached tensors; they stay available after the block.

    Raises:
        ValueError: see [`moe_layers`].

    Example:
        ```python
        with record_routing(model) as recorder:
            model(**inputs)
        recorder.layers[0].top_k_index[0]  # (T, K)
        ```
    """
    recorder = RoutingRecorder([LayerRecord(view) for view in moe_layers(model)])
    handles = []
    try:
        for layer in recorder.layers:
            handles.append(layer.view.router.register_forward_hook(_recording_hook(layer, offload)))
        with torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext():
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to the model or to a part of it.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `bool`
    """
    # `_compiled_call` is what `generate` keeps its compiled forward in.
    return any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None or hasattr(m, "_compiled_call")
        for m in model.modules()
    )


def _recording_hook(layer: LayerRecord, offload: bool):
    def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
        if in_backward():
            return
        for store, tensor in zip(
            (layer.router_logits, layer.top_k_weights, layer.top_k_index), layer.view.read(output), strict=True
        ):
            tensor = tensor.detach()
            store.append(tensor.cpu() if offload else tensor)

    return hook
