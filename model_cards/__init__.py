"""Model cards of trained models and of every registered type; imported as `hf_moe.model_cards`."""

from hf_moe.lazy import lazy_exports


# public name -> the module of this folder that defines it
_EXPORTS: dict[str, str] = {
    "MoeModelCard": ".card",
    "Paper": ".bibliography",
    "TypeCard": ".type_cards",
    "create_model_card": ".card",
    "find_papers": ".bibliography",
    "list_papers": ".bibliography",
    "list_type_cards": ".type_cards",
    "type_card": ".type_cards",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
