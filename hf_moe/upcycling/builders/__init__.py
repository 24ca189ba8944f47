"""Expert builders: how the experts of a layer are made from its dense feed-forward. One file per recipe."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Copy": ".copy",
        "Diversify": ".diversify",
        "Drop": ".drop",
        "ExpertBuilder": ".base",
        "FromModels": ".from_models",
        "ImportanceShared": ".importance_shared",
        "Masks": ".masks",
        "Noise": ".noise",
        "Split": ".split",
        "VirtualGroups": ".virtual_groups",
    },
)
