"""Model cards of trained models, of every registered type and of methods; imported as `hf_moe.model_cards`."""

from hf_moe.lazy import lazy_exports


# public name -> the module of this folder that defines it
_EXPORTS: dict[str, str] = {
    "MethodCard": ".method_cards",
    "MoeModelCard": ".card",
    "Paper": ".bibliography",
    "TypeCard": ".type_cards",
    "create_model_card": ".card",
    "find_papers": ".bibliography",
    "list_method_cards": ".method_cards",
    "list_papers": ".bibliography",
    "list_type_cards": ".type_cards",
    "method_card": ".method_cards",
    "type_card": ".type_cards",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
