"""Growth: a small trained model becomes a larger one of the same class (AquilaMoE, 2408.06567; bert2BERT, 2110.07143).

Units (coordinates of the residual stream, channels of the feed-forward, attention heads) are copied and what leaves
the copies is shared out between them, so that a wider model starts where the small one stopped (`width.py`). Layers
are repeated (`depth.py`). Which axis of which weight belongs to which units is a table (`families.py`).
"""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "GrowthReport": ".report",
        "UnitMap": ".unit_maps",
        "depth_map": ".depth",
        "grow_heads": ".unit_maps",
        "grow_model": ".grow",
        "growable_families": ".families",
    },
)
