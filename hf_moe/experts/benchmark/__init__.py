"""Interleaved comparison of experts implementations, and the tuning of the selection table with it."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "GEOMETRIES": ".geometry",
        "Comparison": ".measure",
        "Geometry": ".geometry",
        "compare": ".measure",
        "markdown_table": ".results",
        "peak_bytes": ".memory",
        "plot": ".results",
        "tune": ".tuning",
    },
)
