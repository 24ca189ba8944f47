"""One expert (or a few) becomes many: the step between the two phases of EvoMoE (2112.14397).

Shapes: N experts before, M after.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_moe.routing.base import BaseRouter
from hf_moe.routing.registry import build_router
from hf_moe.views import moe_layers, unwrap_model

from .builders.diversify import Diversify
from .expert_axis import LayerTensors, expert_tensors, rebuild, set_expert_counts
from .sources import check_source


__all__ = ["expand_experts", "expand_optimizer_state"]

logger = logging.get_logger(__name__)

ROUTERS = ("zeros", "repeat", "fresh")
MOMENTS = ("copy", "reset")


def expand_experts(
    model: PreTrainedModel,
    num_experts: int,
    diversify: str = "mask",
    rate: float = 0.1,
    sigma: float = 0.01,
    seed: int = 0,
    router: str = "zeros",
    **config_overrides: Any,
) -> PreTrainedModel:
    r"""A model with `num_experts` experts in place of each layer's one (or of each of its N: every expert is then
    followed by its copies). The model itself is left as it is.

    [EvoMoE](https://huggingface.co/papers/2112.14397), Sec. 3: train one expert, copy it to many that differ, then let
    a dense-to-sparse gate choose. Routers start at zero, so that the gate, which adds noise, finds all experts equally
    good. `router="repeat"` gives copies the row of the expert they come from: with weights that sum to 1 and
    `num_experts_per_tok` multiplied alike, copies then compute exactly what the experts did.

    Args:
        model (`PreTrainedModel`): Any model with stacked experts that [`moe_layers`] can read.
        num_experts (`int`): M, a multiple of N.
        diversify (`str`, defaults to `"mask"`): `"mask"`, `"noise"` or `"copy"`, see [`Diversify`].
        rate (`float`, defaults to 0.1): Share of entries that `"mask"` draws anew from N(0, initializer_range^2).
        sigma (`float`, defaults to 0.01): Spread of `"noise"`, relative to that of a matrix.
        seed (`int`, defaults to 0): Seed of everything random.
        router (`str`, defaults to `"zeros"`): `"zeros"`, `"repeat"`, or `"fresh"`: first values of the router's own
            (routers of this package only).
        **config_overrides: Further fields of the new config: `router_type`, `router_config`, `num_experts_per_tok`.

    Returns:
        `PreTrainedModel`: In evaluation mode.

    Raises:
        ValueError: an argument that cannot work, experts that are not stacked.

    Example:

    ```python
    >>> moe = expand_experts(phase_one, 8, router_type="dense_to_sparse", router_config={"temperature": 2.0})
    ```
    """
    check_source(model)
    text = model.config.get_text_config()
    builder = Diversify(diversify, rate, sigma, std=getattr(text, "initializer_range", None))
    if router not in ROUTERS:
        raise ValueError(f"`router` must be one of {list(ROUTERS)}, got {router!r}.")
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"`num_experts` must be a whole number of at least 1, got {num_experts!r}.")
    if router == "fresh" and not hasattr(text, "router_type"):
        raise ValueError(
            f"`router='fresh'` is for routers of this package; those of {type(model).__name__} can be 'zeros' or "
            "'repeat'."
        )
    layers = expert_tensors(model)
    before = [layer.view.num_computing_experts for layer in layers]
    for layer, experts in zip(layers, before, strict=True):
        if num_experts % experts:
            raise ValueError(
                f"`num_experts` must be a multiple of the {experts} experts of `{layer.view.name}`, got {num_experts}."
            )
    config = _edited_config(model, before, num_experts, config_overrides)
    with torch.device("meta"):
        skeleton = type(model)(config)
    generator = torch.Generator().manual_seed(seed)
    state_dict = dict(model.state_dict())
    for layer in layers:
        for name, axis in layer.axes.items():
            tensor = state_dict.pop(name).detach()
            if name.startswith(f"{layer.view.name}.experts."):
                state_dict[name] = _diversified(tensor, num_experts, builder, generator)
            elif router != "fresh":
                state_dict[name] = _rows(tensor, axis, layer, num_experts, keep=router == "repeat")
        for name in (*layer.pairs, *layer.tables):
            del state_dict[name]
    wanted = skeleton.state_dict()  # a router of another type has other tensors
    state_dict = {name: tensor for name, tensor in state_dict.items() if name in wanted}
    fresh = _first_router_values(skeleton, config.get_text_config(), seed)
    state_dict |= {name: tensor for name, tensor in fresh.items() if name in wanted and name not in state_dict}
    expanded = rebuild(model, config, state_dict).eval()
    config = expanded.config.get_text_config()
    config.upcycling = {
        **(getattr(text, "upcycling", None) or {}),
        "expansion": {"from": before, "to": num_experts, "router": router, "seed": seed, **builder.describe()},
    }
    if router == "zeros" and getattr(config, "router_type", "") != "dense_to_sparse":
        logger.warning(
            "Routers that start at zero send every token to the same experts unless they add noise of their own. Pass "
            '`router_type="dense_to_sparse"`, or `router="repeat"` where there are several experts already.'
        )
    return expanded


def _edited_config(model: PreTrainedModel, before: list[int], num_experts: int, overrides: dict[str, Any]) -> Any:
    config: Any = copy.deepcopy(model.config)
    set_expert_counts(config, before, [num_experts] * len(before))
    text = config.get_text_config()
    unknown = [name for name in overrides if not hasattr(text, name)]
    if unknown:
        raise ValueError(f"{type(text).__name__} has no field {unknown[0]!r}.")
    if text is config:  # made anew, so that it is checked
        return type(config).from_dict({**config.to_dict(), **overrides})
    for name, value in overrides.items():
        setattr(text, name, value)
    return config


def _diversified(
    tensor: torch.Tensor, num_experts: int, builder: Diversify, generator: torch.Generator
) -> torch.Tensor:
    """`(N, ...) -> (M, ...)`; biases, one vector per expert, are copied."""
    copies = tensor.repeat_interleave(num_experts // tensor.shape[0], dim=0)
    if builder.is_silent or tensor.ndim < 3:
        return copies
    return torch.stack([builder.changed(matrix, generator) for matrix in copies])


def _rows(tensor: torch.Tensor, axis: int, layer: LayerTensors, num_experts: int, keep: bool) -> torch.Tensor:
    """What a router has per expert, repeated or zero; experts that compute nothing come last and stay as many."""
    computing = layer.num_experts - layer.num_idle
    rows, idle = tensor.split([computing, tensor.shape[axis] - computing], dim=axis)
    rows = torch.cat([rows.repeat_interleave(num_experts // computing, dim=axis), idle], dim=axis)
    return rows if keep else torch.zeros_like(rows)


def _first_router_values(skeleton: nn.Module, config: Any, seed: int) -> dict[str, torch.Tensor]:
    """What routers of this package start with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            f"{path}.{name}": tensor
            for path, router in skeleton.named_modules()
            if isinstance(router, BaseRouter)
            for name, tensor in build_router(config, router.layer_idx).state_dict().items()
        }


@torch.no_grad()
def expand_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, moments: str = "copy") -> int:
    """Fits an optimizer state from before [`expand_experts`] to the model it made. Does nothing where all shapes fit.

    Every expert gets the moments of the expert it is a copy of; routers begin anew, step count included.

    Args:
        optimizer (`torch.optim.Optimizer`): Of the expanded model, with the state of the model before
            (`load_state_dict` does not look at shapes).
        model (`nn.Module`): The expanded model.
        moments (`str`, defaults to `"copy"`): `"copy"`, or `"reset"`: expanded experts begin anew too.

    Returns:
        `int`: Parameters whose state was changed.

    Raises:
        ValueError: an unknown `moments`, or a state of another model.

    Example:

    ```python
    >>> optimizer.load_state_dict(state_of_phase_one)
    >>> expand_optimizer_state(optimizer, moe)
    ```
    """
    if moments not in MOMENTS:
        raise ValueError(f"`moments` must be one of {list(MOMENTS)}, got {moments!r}.")
    views = moe_layers(unwrap_model(model))
    routers = {id(parameter) for view in views for parameter in view.router.parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    changed = 0
    for parameter in list(optimizer.state):
        state = optimizer.state[parameter]
        misfits = {k: t for k, t in state.items() if _misfit(t, parameter)}
        if not misfits:
            continue
        changed += 1
        if id(parameter) in routers or moments == "reset":
            del optimizer.state[parameter]
            continue
        for key, tensor in misfits.items():
            copies, rest = divmod(parameter.shape[0], tensor.shape[0])
            if rest or tensor.shape[1:] != parameter.shape[1:]:
                raise ValueError(
                    f"The state {key!r} of `{names.get(id(parameter))}` has the shape {tuple(tensor.shape)}, which "
                    f"does not expand to {tuple(parameter.shape)}: it belongs to another model."
                )
            state[key] = tensor.repeat_interleave(copies, dim=0)
    return changed


def _misfit(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape != parameter.shape
