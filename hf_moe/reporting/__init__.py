"""How a model routes text: statistics, plots, a page to read, a callback that watches training."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ExpertLoadCallback": ".callback",
        "LayerReport": ".report",
        "LayerShift": ".shift",
        "LayerSnapshot": ".snapshot",
        "RoutingReport": ".report",
        "RoutingReportCallback": ".report_callback",
        "RoutingSnapshot": ".snapshot",
        "ShiftReport": ".shift",
        "TokenExample": ".report",
        "routing_report": ".collect",
        "routing_shift": ".shift",
        "routing_snapshot": ".snapshot",
        "token_class": ".token_classes",
    },
)
