"""Experts kernels for CPU, registered as `experts_implementation="hf_moe"` and one name per path.

Importing `hf_moe` is enough: the names are there as soon as transformers loads its registry (see
`hf_moe.registration.when_imported`), for every MoE of transformers and ours.
"""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "IMPLEMENTATIONS": ".front",
        "build_compiled": ".compiled",
        "choose_path": ".front",
        "hf_moe_experts_forward": ".front",
    },
)
