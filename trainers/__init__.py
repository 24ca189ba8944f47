"""Trainers, their configurations and callbacks; imported as `hf_moe.trainers`, each name on first use."""

from hf_moe.lazy import lazy_exports


# public name -> the module of this folder that defines it
_EXPORTS: dict[str, str] = {}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
