"""`upcycled_<type>`: any transformers model with some of its feed-forwards replaced by MoE blocks.

For architectures without a backbone of their own here. The classes of a dense type are made when the type is first
needed: `upcycled_gemma2` has `UpcycledGemma2Config`, `UpcycledGemma2ForCausalLM` and so on.
"""

from importlib import import_module

from .configuration_upcycled import upcycled_config_class


__all__ = ["upcycled_config_class", "upcycled_model_class"]


def __getattr__(name: str) -> type:
    # Pickle and the Hub shim find made classes by name, also in a process that has not made them yet.
    if not name.startswith("Upcycled") and name != "upcycled_model_class":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    factory = import_module(f"{__name__}.factory")
    return factory.upcycled_model_class if name == "upcycled_model_class" else factory.class_by_name(name)
