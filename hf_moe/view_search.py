"""Finds the MoE layers of a model, ours or in-tree, also inside wrappers."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .routing.base import BaseRouter
from .view_families import BLOCKS_OF_ROUTERS, FAMILY_RULES, REFUSED_FAMILIES
from .view_layer import MoeLayerView
from .view_rules import FamilyRule


__all__ = ["moe_layers", "unwrap_model"]


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


def has_moe_layers(model: nn.Module) -> bool:
    """Whether any module of `model` is a router [`moe_layers`] would find.

    Args:
        model (`nn.Module`): A transformers model, bare or wrapped.

    Raises:
        ValueError: a router is of a family that [`FAMILY_RULES`] does not describe.
    """
    return next(_routers(unwrap_model(model), "", ()), None) is not None


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
