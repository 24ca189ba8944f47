"""Serving models whose experts do not all fit: which ones stay in fast memory, and which requests run together."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ExpertCache": ".expert_cache",
        "count_hits": ".expert_cache",
        "form_batch": ".batching",
        "queues_by_expert": ".batching",
    },
)
