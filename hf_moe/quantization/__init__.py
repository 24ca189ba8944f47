"""Compressed experts behind transformers' quantizer registry. One folder per method."""

from importlib import import_module

from hf_moe.lazy import lazy_exports


#: One line per method: its folder, whose `register` enters it.
METHODS = ("mote",)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "MoteQuantizationConfig": ".mote.config",
        "TernaryReport": ".mote.export",
        "export_ternary": ".mote.export",
    },
)


def register_all() -> None:
    """Enters every method in transformers."""
    for method in METHODS:
        import_module(f"{__name__}.{method}").register()
