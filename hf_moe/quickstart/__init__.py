"""`hf-moe quickstart`: a real dense model becomes a Mixture-of-Experts, trains, reports, saves and reloads."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "add_arguments": ".arguments",
        "run": ".command",
    },
)
