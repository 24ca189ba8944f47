"""One uniform handle on the MoE layers of a transformers model, ours or in-tree, also under PEFT.

Shapes: B batch, S sequence, T = B * S tokens, N experts, K per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .routing.base import BaseRouter
from .view_families import BLOCKS_OF_ROUTERS, FAMILY_RULES, REFUSED_FAMILIES
from .view_rules import FamilyRule, Routing


__all__ = [
    "FAMILY_RULES",
    "FamilyRule",
    "LayerRecord",
    "MoeLayerView",
    "Routing",
    "RoutingRecorder",
    "in_backward",
    "is_compiled",
    "moe_layers",
    "record_routing",
    "unwrap_model",
]


@dataclass(frozen=True)
class MoeLayerView:
    """One MoE layer.

    Args:
        name (`str`): Path of the block in the model below any wrapper, such as `"model.layers.3.mlp"`.
        index (`int`): Position among the MoE layers, from 0.
        block (`nn.Module`): The module that owns router and experts.
        router (`nn.Module`): Its router.
        experts (`nn.Module`): Its stacked experts.
        num_experts (`int`): N.
        num_experts_per_tok (`int`): K.
        rule ([`FamilyRule`], *optional*): How to read the router's output; `None` for our own routers.

    Example:
        ```python
        view = moe_layers(model)[0]
        routing = view.read(view.router(hidden_states))
        view.probabilities(routing.router_logits)  # (T, N)
        ```
    """

    name: str
    index: int
    block: Any = field(repr=False)
    router: Any = field(repr=False)
    experts: Any = field(repr=False)
    num_experts: int
    num_experts_per_tok: int
    rule: FamilyRule | None = None

    @property
    def score_function(self) -> str:
        """What makes scores of logits: `"softmax"`, `"sigmoid"`, or the name of the router's own function."""
        if self.rule is not None:
            return self.rule.score_function(self.router)
        return getattr(type(self.router), "router_type", "") or type(self.router).__name__

    @property
    def normalisation(self) -> str:
        """What makes weights of the chosen scores: `"none"`, `"sum"`, `"softmax"` (of the chosen logits), or words."""
        if self.rule is not None:
            return self.rule.normalisation(self.router)
        return "sum" if self.router.norm_topk_prob else "none"

    @property
    def top_k_source(self) -> str:
        """Where the number of experts per token is read from at every call: an attribute of the router."""
        return "top_k" if self.rule is None else self.rule.top_k

    @property
    def num_computing_experts(self) -> int:
        """Experts with a feed-forward. Those without, such as MoE++'s zero-computation experts, come after them."""
        return self.num_experts - len(self._idle_experts)

    @property
    def expert_labels(self) -> list[str]:
        """A short name per expert: its number, or what an expert without a feed-forward does."""
        return [*(str(i) for i in range(self.num_computing_experts)), *self._idle_experts]

    @property
    def _idle_experts(self) -> tuple[str, ...]:
        if self.rule is not None:
            return self.rule.idle_experts(self.router)
        zero_experts = getattr(self.block, "zero_experts", None)
        if zero_experts is None:
            return ()
        kinds = ("constant", "copy", "zero")
        return tuple(f"{kind} {i}" for kind in kinds for i in range(getattr(zero_experts, f"num_{kind}")))

    def read(self, output: Any) -> Routing:
        """The decision in a value returned by `router`, flattened to one row per token.

        Args:
            output (`tuple`): What the router returned.

        Returns:
            [`Routing`]
        """
        if self.rule is not None:
            return self.rule.read(self.router, output)
        tensors = (output.router_logits, output.top_k_weights, output.top_k_index)
        return Routing(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors))

    def write(self, output: Any, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> Any:
        """A value as returned by `router`, with another decision in it.

        Args:
            output (`tuple`): What the router returned.
            top_k_weights (`torch.Tensor` of shape `(T, K')`): New weights.
            top_k_index (`torch.Tensor` of shape `(T, K')`): New experts.

        Returns:
            The tuple to hand to the block.
        """
        if self.rule is not None:
            return self.rule.write(self.router, output, top_k_weights, top_k_index)
        return output._replace(top_k_weights=top_k_weights, top_k_index=top_k_index)

    @property
    def max_slots(self) -> int | None:
        """The most experts per token that the block can take; `None` where there is no limit."""
        return None if self.rule is None else self.rule.max_slots(self.router)

    @property
    def ordered(self) -> bool:
        """Whether the router puts its best expert in the first slot."""
        return self.rule is None or self.rule.ordered

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Logits -> scores as the router makes them, both `(T, N)`."""
        return self.router.scores(router_logits) if self.rule is None else self.rule.scores(self.router, router_logits)

    def choice_scores(
        self, scores: torch.Tensor, router_logits: torch.Tensor, args: tuple = (), kwargs: dict | None = None
    ) -> torch.Tensor:
        """What the router ranks the experts by, without gradient: selection bias and group limits are in it.

        Args:
            scores (`torch.Tensor` of shape `(T, N)`): See `scores`.
            router_logits (`torch.Tensor` of shape `(T, N)`): As in [`Routing`].
            args, kwargs: What the router was called with: some families hand it its bias.

        Returns:
            `torch.Tensor` of shape `(T, N)`.
        """
        with torch.no_grad():
            if self.rule is None:
                return self.router.choice_scores(scores, router_logits)
            return self.rule.choice_scores(self.router, scores, router_logits, args, kwargs or {})

    def weigh(
        self,
        scores: torch.Tensor,
        router_logits: torch.Tensor,
        top_k_index: torch.Tensor,
        args: tuple = (),
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights the router would give to these experts.

        Args:
            scores (`torch.Tensor` of shape `(T, N)`): See `scores`.
            router_logits (`torch.Tensor` of shape `(T, N)`): As in [`Routing`].
            top_k_index (`torch.Tensor` of shape `(T, K')`): The experts, no empty slots.
            args (`tuple`): What the router was called with.
            tokens (`torch.Tensor` of shape `(T,)`, *optional*): Positions of these tokens among those of that call.

        Returns:
            `torch.Tensor` of shape `(T, K')`.
        """
        if self.rule is None:
            return self.router.weigh(scores, top_k_index)
        return self.rule.weigh(self.router, scores, router_logits, top_k_index, args, tokens)

    def probabilities(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Distribution over the experts before any selection bias, float32, rows summing to 1.

        Args:
            router_logits (`torch.Tensor` of shape `(T, N)`): As in [`Routing`].

        Returns:
            `torch.Tensor` of shape `(T, N)`.
        """
        if self.rule is None:
            return self.router.probabilities(router_logits.float())
        return self.rule.probabilities(self.router, router_logits)


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT, data-parallel and `torch.compile` wrappers.

    Args:
        model (`nn.Module`): Wrapped or not.

    Returns:
        `PreTrainedModel`

    Example:
        ```python
        unwrap_model(peft.get_peft_model(model, config)) is model  # True
        ```
    """
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        else:
            return inner


def moe_layers(model: nn.Module) -> list[MoeLayerView]:
    """The MoE layers of `model`, in the order of its modules.

    A router is a module of a class named by `_can_record_outputs["router_logits"]` of the model it sits in, or any
    [`~hf_moe.routing.BaseRouter`].

    Args:
        model (`nn.Module`): A transformers model, bare or wrapped by PEFT, data parallelism or `torch.compile`.

    Returns:
        `list[MoeLayerView]`

    Raises:
        ValueError: `model` has no MoE layer, or is of a family that [`FAMILY_RULES`] does not describe.

    Example:
        ```python
        for layer in moe_layers(model):
            logger.info(f"{layer.name}: {layer.num_experts_per_tok} of {layer.num_experts} experts")
        ```
    """
    model = unwrap_model(model)
    views: list[MoeLayerView] = []
    router: Any
    block: Any
    for path, router, rule in _routers(model, "", ()):
        name, block = _owner(model, path)
        experts = block.experts
        if hasattr(experts, "get_base_layer"):  # LoRA on stacked experts wraps them
            experts = experts.get_base_layer()
        if rule is None:
            sizes = router.num_experts, router.top_k
        else:
            sizes = rule.num_experts(router), rule.num_experts_per_tok(router)
        views.append(MoeLayerView(name, len(views), block, router, experts, *sizes, rule))
    if not views:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no MoE layer: none of its modules is a router. Pass a "
            "Mixture-of-Experts model, or make one of a dense model with `hf_moe.upcycle`."
        )
    return views


def _routers(
    module: nn.Module, path: str, recorders: tuple[OutputRecorder, ...]
) -> Iterator[tuple[str, nn.Module, FamilyRule | None]]:
    """Routers below `module` with their paths; each sub-model's own recorders hold inside it, as in transformers."""
    if isinstance(module, PreTrainedModel):
        specs = (module._can_record_outputs or {}).get("router_logits", ())
        specs = specs if isinstance(specs, (list, tuple)) else (specs,)
        recorders = tuple(s if isinstance(s, OutputRecorder) else OutputRecorder(s) for s in specs)
    # PEFT's `modules_to_save` keeps the original beside the trained copy: only the wrapper knows which one runs.
    original = getattr(module, "original_module", None) if hasattr(module, "modules_to_save") else None
    candidate = module if original is None else original
    if isinstance(candidate, BaseRouter):
        yield path, module, None
    elif any(_records(recorder, candidate, path) for recorder in recorders):
        if type(candidate).__name__ in BLOCKS_OF_ROUTERS:
            for name, child in module.named_modules():
                if type(child).__name__ in FAMILY_RULES:
                    yield f"{path}.{name}", child, _rule(child)
        else:
            yield path, module, _rule(candidate)
    else:
        for name, child in module.named_children():
            yield from _routers(child, f"{path}.{name}" if path else name, recorders)


def _records(recorder: OutputRecorder, module: nn.Module, path: str) -> bool:
    if not isinstance(recorder.target_class, type) or not isinstance(module, recorder.target_class):
        return False
    return recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{path}."


def _rule(router: nn.Module) -> FamilyRule:
    for cls in type(router).__mro__:
        if cls.__name__ in FAMILY_RULES:
            return FAMILY_RULES[cls.__name__]
        if cls.__name__ in REFUSED_FAMILIES:
            raise ValueError(
                f"Views do not support {cls.__name__} ({cls.__module__}): {REFUSED_FAMILIES[cls.__name__]}"
            )
    raise ValueError(
        f"No rule says how to read {type(router).__name__} ({type(router).__module__}). Add one to "
        f"`hf_moe.views.FAMILY_RULES`: `FAMILY_RULES[{type(router).__name__!r}] = FamilyRule(score=..., "
        "router_logits=..., top_k_weights=..., top_k_index=...)`, where the numbers are positions in the tuple that "
        "the router returns."
    )


def _owner(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The nearest module above `path` that has `experts`: not always the parent, a wrapper may lie between."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        name = ".".join(parts[:depth])
        block = model.get_submodule(name)
        if isinstance(getattr(block, "experts", None), nn.Module):
            return name, block
    raise ValueError(
        f"The router at {path!r} of `model` ({type(model).__name__}) belongs to no module with an attribute "
        "`experts`, so its experts cannot be found. Views need a block that holds both."
    )


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
