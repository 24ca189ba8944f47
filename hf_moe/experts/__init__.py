"""Expert banks: stacked 3-D parameters behind transformers' experts contract, and experts that cost nothing."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BiasedMlpExperts": ".stacked",
        "BiasedSwiGLUExperts": ".stacked",
        "MlpExperts": ".stacked",
        "StackedExperts": ".stacked",
        "SwiGLUExperts": ".stacked",
        "TernaryExperts": ".ternary",
        "ZeroComputationExperts": ".zero_computation",
        "build_experts": ".registry",
        "list_experts": ".registry",
        "register_experts": ".registry",
    },
)
