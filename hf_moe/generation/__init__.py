"""Decoding methods that enter through `generate(custom_generate=...)`."""

from hf_moe.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SelfContrast": ".self_contrast",
        "SelfContrastOutput": ".output",
        "WeakRouting": ".weak",
        "contrast_logits": ".contrast",
        "export_decoder": ".export",
        "parse_weak": ".weak",
        "scmoe_generate": ".helper",
    },
)
