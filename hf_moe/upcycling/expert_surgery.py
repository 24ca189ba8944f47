"""Other experts in a model that has some: a new model of the same class, its stacked experts and routers edited.

Shapes: N experts before, M after; R rows of a router (N or M, and zero-computation experts).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_moe.routing.base import BaseRouter
from hf_moe.routing.registry import build_router
from hf_moe.view_layer import MoeLayerView
from hf_moe.views import moe_layers

from .sources import check_source


__all__ = ["edit_experts", "expert_tensors", "router_tensors"]

# Names under which configs of transformers and ours keep the number of experts.
NUMBER_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

#: Given a layer, the name of a tensor within its module, and the tensor: what takes its place. `None` leaves a tensor
#: of a router to the router's own first values.
Edit = Callable[[MoeLayerView, str, torch.Tensor], torch.Tensor | None]


def expert_tensors(view: MoeLayerView) -> dict[str, nn.Parameter]:
    """The stacked parameters of a layer's experts, `(N, ...)`, by name within `view.experts`."""
    count = view.num_computing_experts
    return {n: p for n, p in view.experts.named_parameters() if p.ndim > 1 and p.shape[0] == count}


def router_tensors(view: MoeLayerView) -> dict[str, torch.Tensor]:
    """What a router keeps per expert, `(R, ...)`, by name within `view.router`: matrix, bias, selection bias."""
    return {name: t for name, t in view.router.state_dict().items() if t.ndim > 0 and t.shape[0] == view.num_experts}


@torch.no_grad()
def edit_experts(
    model: PreTrainedModel,
    num_experts: int | list[int],
    *,
    expert: Edit,
    router: Edit,
    argument: str = "model",
    seed: int = 0,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A copy of `model` with other experts. The model itself is left as it is.

    Args:
        model (`PreTrainedModel`): Any model whose MoE layers [`moe_layers`] can read and whose experts are stacked.
        num_experts (`int` or `list[int]`): M, or one number per MoE layer (models of this package only).
        expert (`Callable`): `(view, name, tensor (N, ...)) -> (M, ...)`, called for every stacked parameter.
        router (`Callable`): `(view, name, tensor (R, ...)) -> (R', ...)`, or `None` for the router's own first values,
            called for what a router keeps per expert.
        argument (`str`, defaults to `"model"`): Name of the caller's argument, for messages.
        seed (`int`, defaults to 0): Seed of first values.
        **config_overrides: Further fields of the new config, `router_type` for example.

    Returns:
        `PreTrainedModel`: Of the same class and dtype, on the same device, in evaluation mode.

    Raises:
        ValueError: no stacked experts, a config without a number of experts, an unknown field.
        TypeError: not a transformers model.

    Example:

    ```python
    >>> first_two = edit_experts(moe, 2, expert=lambda v, n, t: t[:2], router=lambda v, n, t: t[:2])
    ```
    """
    check_source(model, argument)
    views = moe_layers(model)
    config = _edited_config(model, num_experts, config_overrides)
    with torch.device("meta"):
        skeleton = type(model)(config)
    # A router of another type may have other tensors, and what depends on N has its own first values.
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    entries: dict[str, torch.Tensor | None] = dict(model.state_dict())
    modules = {id(module): name for name, module in model.named_modules()}
    for view in views:
        stacked = expert_tensors(view)
        if not stacked:
            raise ValueError(
                f"The experts of `{view.name}` ({type(view.experts).__name__}) are not stacked in parameters of shape "
                f"({view.num_computing_experts}, ...), so they cannot be edited together."
            )
        for edit, module, tensors in (
            (expert, view.experts, stacked), (router, view.router, router_tensors(view))
        ):  # fmt: skip
            for name, tensor in tensors.items():
                entries[f"{modules[id(module)]}.{name}"] = edit(view, name, tensor.detach())
    kept = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in entries.items()
        if tensor is not None and shapes.get(name) == tensor.shape and name not in _tied(model)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, tensor in _fresh_router_tensors(skeleton, config).items():
            if name not in kept and shapes.get(name) == tensor.shape:
                kept[name] = tensor
        return _load(model, config, kept, shapes, views, modules)


def _fresh_router_tensors(skeleton: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """First values of the routers of this package, so that nothing has to be called missing when the result loads."""
    return {
        f"{path}.{name}": tensor
        for path, router in skeleton.named_modules()
        if isinstance(router, BaseRouter)
        for name, tensor in build_router(config.get_text_config(), router.layer_idx).state_dict().items()
    }


def _load(
    model: PreTrainedModel,
    config: Any,
    kept: dict[str, torch.Tensor],
    shapes: dict[str, torch.Size],
    views: list[MoeLayerView],
    modules: dict[int, str],
) -> PreTrainedModel:
    loaded: Any = type(model).from_pretrained(
        None, config=config, state_dict=kept, dtype=model.dtype, output_loading_info=True
    )
    edited, info = loaded
    fresh = (*(f"{modules[id(view.router)]}." for view in views), "load_balancer.", "model.load_balancer.")
    lacking = sorted(key for key in info["missing_keys"] if not key.startswith(fresh))
    if lacking:
        had = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        raise ValueError(
            f"`{lacking[0]}` of {type(model).__name__} depends on the number of experts and is not edited: "
            f"{had.get(lacking[0])} before, {tuple(shapes[lacking[0]])} after."
        )
    edited.config.name_or_path = ""
    if getattr(model, "generation_config", None) is not None:
        edited.generation_config = copy.deepcopy(model.generation_config)
    kernel = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if kernel is not None and kernel != edited.config.get_text_config()._experts_implementation:
        edited.set_experts_implementation(kernel)
    return edited.to(model.device).eval()


def _tied(model: PreTrainedModel) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _edited_config(model: PreTrainedModel, num_experts: int | list[int], overrides: dict[str, Any]) -> Any:
    text = model.config.get_text_config()
    fields = [name for name in NUMBER_FIELDS if name in text.to_dict()]
    if not fields:
        raise ValueError(
            f"{type(text).__name__} has none of the fields {list(NUMBER_FIELDS)}, so the number of its experts cannot "
            "be changed."
        )
    unknown = [name for name in overrides if not hasattr(text, name)]
    if unknown:
        raise ValueError(f"{type(text).__name__} has no field {unknown[0]!r}.")
    values = {**{name: num_experts for name in fields}, **overrides}
    if text is model.config:
        return type(text).from_dict({**copy.deepcopy(text.to_dict()), **values})
    config = copy.deepcopy(model.config)
    for name, value in values.items():
        setattr(config.get_text_config(), name, value)
    return config
