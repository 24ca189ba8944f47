"""How a model routes text: statistics, plots, a page to read, a callback that watches training."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ExpertLoadCallback": ".callback",
        "LayerReport": ".report",
        "RoutingReport": ".report",
        "TokenExample": ".report",
        "routing_report": ".collect",
    },
)
