"""Learning rates of their own for routers and experts."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_moe.views import moe_layers


__all__ = ["optimizer_groups", "parameter_roles", "split_param_groups"]

ROLES = ("rest", "router", "expert")


def parameter_roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """What the parameters of a Mixture-of-Experts model belong to.

    Args:
        model (`nn.Module`): A model accepted by [`~hf_moe.moe_layers`], ours or in-tree, also under PEFT.

    Returns:
        `dict[nn.Parameter, str]`: Every parameter's role: `"router"`, `"expert"` (those a router chooses from: stacked
        and zero-computation ones, adapters on them included) or `"rest"` (shared experts too).
    """
    roles = dict.fromkeys(model.parameters(), "rest")
    for view in moe_layers(model):
        for part in (view.block.experts, getattr(view.block, "zero_experts", None)):
            if part is not None:
                roles.update(dict.fromkeys(part.parameters(), "expert"))
        roles.update(dict.fromkeys(view.router.parameters(), "router"))
    return roles


def optimizer_groups(
    model: nn.Module,
    learning_rate: float,
    router_learning_rate: float | None = None,
    expert_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: routers, experts and the rest, each with its learning rate.

    Args:
        model (`nn.Module`): A model accepted by [`~hf_moe.moe_layers`].
        learning_rate (`float`): Of everything that is neither router nor expert.
        router_learning_rate (`float`, *optional*): Of routers; `learning_rate` by default.
        expert_learning_rate (`float`, *optional*): Of experts; `learning_rate` by default.
        weight_decay (`float`, defaults to 0.0): Of matrices and banks of them; vectors (biases, norms) get none.

    Returns:
        `list[dict]`: Groups with `params`, `lr`, `weight_decay`, `role`. Frozen parameters are left out.

    Raises:
        ValueError: a learning rate is negative, or the model has no MoE layer.

    Example:

    ```python
    >>> from hf_moe.trainers import optimizer_groups
    >>> groups = optimizer_groups(model, learning_rate=1e-5, router_learning_rate=1e-4)
    >>> optimizer = torch.optim.AdamW(groups)
    ```
    """
    rates = {"rest": learning_rate, "router": router_learning_rate, "expert": expert_learning_rate}
    _check_rates(rates)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter, role in parameter_roles(model).items():
        if parameter.requires_grad:
            groups.setdefault((role, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": params,
            "lr": learning_rate if rates[role] is None else rates[role],
            "weight_decay": weight_decay if decays else 0.0,
            "role": role,
        }
        for (role, decays), params in sorted(groups.items(), key=lambda item: ROLES.index(item[0][0]))
    ]


def split_param_groups(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    router_learning_rate: float | None = None,
    expert_learning_rate: float | None = None,
) -> None:
    """Splits the groups of a new optimizer by role. All other options of a group, weight decay too, stay as they are.

    Args:
        optimizer (`torch.optim.Optimizer`): One that has made no step yet.
        model (`nn.Module`): The model whose parameters it holds.
        router_learning_rate, expert_learning_rate (`float`, *optional*): A group's own by default.

    Raises:
        ValueError: a learning rate is negative, or the optimizer has made steps.
    """
    if optimizer.state:
        raise ValueError("`optimizer` has made steps; split its groups before the first one.")
    rates = {"router": router_learning_rate, "expert": expert_learning_rate}
    _check_rates(rates)
    roles = parameter_roles(model)
    old = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    # Parameters that are neither router nor expert come first: a Trainer logs the learning rate of the first group.
    for role in ROLES:
        for group in old:
            params = _with_role(group["params"], roles, role)
            if params:
                rate = group["lr"] if rates.get(role) is None else rates[role]
                optimizer.add_param_group({**group, "params": params, "lr": rate, "role": role})


def _with_role(parameters: Iterable[nn.Parameter], roles: dict[nn.Parameter, str], role: str) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if roles.get(parameter, "rest") == role]


def _check_rates(rates: dict[str, float | None]) -> None:
    for role, rate in rates.items():
        if rate is not None and rate < 0:
            name = "learning_rate" if role == "rest" else f"{role}_learning_rate"
            raise ValueError(f"`{name}` must not be negative, got {rate}.")
