"""Target writers: a native family where one fits, else a backbone of this package, else the generic classes."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BackboneTarget": ".backbone",
        "CheckpointTarget": ".base",
        "FlexOlmoTarget": ".native",
        "GraniteMoeTarget": ".native",
        "MixtralTarget": ".native",
        "MoePlusPlusTarget": ".backbone",
        "QwenMoeTarget": ".native",
        "Target": ".base",
        "choose_target": ".choose",
        "list_targets": ".choose",
    },
)
