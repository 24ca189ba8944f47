"""Routers: which experts a token is sent to, and the losses and statistics of that decision."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BalanceLosses": ".load_balancer",
        "BaseRouter": ".base",
        "GatingResidualRouter": ".gating_residual",
        "GlobalBalanceCallback": ".callbacks",
        "LayerRouting": ".load_balancer",
        "LinearRouter": ".base",
        "LoadBalancer": ".load_balancer",
        "MoePlusPlusReleaseRouter": ".gating_residual",
        "RouterOutput": ".output",
        "RouterScheduleCallback": ".callbacks",
        "RouterStats": ".statistics",
        "RoutingContext": ".output",
        "SigmoidTopKRouter": ".topk",
        "SoftmaxTopKRouter": ".topk",
        "apply_capacity": ".capacity",
        "build_router": ".registry",
        "list_routers": ".registry",
        "load_balance_loss": ".balance",
        "pack_slots": ".capacity",
        "register_router": ".registry",
        "router_class": ".registry",
    },
)
