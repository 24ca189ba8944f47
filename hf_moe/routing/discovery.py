"""Where a model keeps its routers and load balancers."""

from torch import nn

from .base import BaseRouter
from .load_balancer import LoadBalancer


__all__ = ["find_balancers", "find_routers"]


def find_routers(model: nn.Module) -> dict[str, BaseRouter]:
    """Every router of a model by module name, in order. PEFT's frozen originals of replaced routers are left out."""
    routers = {name: module for name, module in model.named_modules() if isinstance(module, BaseRouter)}
    return {name: router for name, router in routers.items() if not name.endswith(".original_module")}


def find_balancers(model: nn.Module) -> dict[str, tuple[LoadBalancer, list[BaseRouter]]]:
    """Every load balancer by module name, with the routers of the module it sits in.

    A model with several towers has one balancer per tower: a router belongs to the nearest one around it.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoadBalancer)}
    homes = {name.rpartition(".")[0]: name for name in found}
    routers: dict[str, list[BaseRouter]] = {name: [] for name in found}
    for router_name, router in find_routers(model).items():
        around = [home for home in homes if not home or router_name.startswith(f"{home}.")]
        if around:
            routers[homes[max(around, key=len)]].append(router)
    return {name: (balancer, routers[name]) for name, balancer in found.items()}
