"""Model cards of trained models and of every registered type; imported as `hf_moe.model_cards`."""

from hf_moe.lazy import lazy_exports


# public name -> the module of this folder that defines it
_EXPORTS: dict[str, str] = {
    "MoeModelCard": ".card",
    "create_model_card": ".card",
    "list_type_cards": ".types",
    "type_card": ".types",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
