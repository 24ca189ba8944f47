"""Router starts: the first value of each layer's router. One file per idea."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Hash": ".hashing",
        "KMeans": ".kmeans",
        "Normal": ".random",
        "Prompts": ".prompts",
        "Repeated": ".random",
        "RouterInit": ".base",
        "Zeros": ".random",
    },
)
