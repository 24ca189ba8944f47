"""Which modules of an architecture PILL stands at."""

import re
from dataclasses import dataclass
from typing import Any


__all__ = ["KNOWN", "Places", "places_of", "text_config_of"]


@dataclass(frozen=True)
class Places:
    """Names of the modules.

    Args:
        attention_norm (`str`): The norm whose output attention reads.
        feedforward_norm (`str`): The norm whose output the feed-forward reads.
        value_projection (`str`, *optional*): The linear layer that makes the values; `None` where one layer makes
            queries, keys and values.
    """

    attention_norm: str
    feedforward_norm: str
    value_projection: str | None = "v_proj"

    def names(self, attention: bool, gate: bool) -> list[str]:
        """Those an adapter needs."""
        wanted = [self.attention_norm if attention else None, self.feedforward_norm]
        return [name for name in (*wanted, self.value_projection if gate else None) if name is not None]


_LLAMA = Places("input_layernorm", "post_attention_layernorm")
_SANDWICH = Places(
    "input_layernorm", "pre_feedforward_layernorm"
)  # their post_attention_layernorm comes before the sum
_FUSED = Places("input_layernorm", "post_attention_layernorm", None)

KNOWN: dict[str, Places] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "stablelm",
         "starcoder2", "granite", "granitemoe", "smollm3", "olmo", "olmoe", "helium", "nemotron", "qwen2_vl",
         "qwen2_5_vl"),
        _LLAMA,
    ),
    **dict.fromkeys(("gemma2", "gemma3"), _SANDWICH),
    **dict.fromkeys(("phi3", "gpt_neox", "persimmon"), _FUSED),
    "gpt2": Places("ln_1", "ln_2", None),
}  # fmt: skip
_ONE_NORM = (
    "attention and feed-forward read the same norm, so there is no place for adapters of the feed-forward alone"
)
_REFUSED = {
    **dict.fromkeys(("phi", "cohere", "cohere2", "gptj", "falcon", "codegen"), _ONE_NORM),
    **dict.fromkeys(("olmo2", "olmo3"), "its norms come after attention and feed-forward, not before"),
}


def text_config_of(model_config: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's config that is about its language model.

    Args:
        model_config (`dict`): Of the whole model.

    Returns:
        `dict`: A part of it, or all of it.
    """
    text = model_config.get("text_config")
    return text if isinstance(text, dict) else model_config


def places_of(config: Any, model_config: dict[str, Any]) -> Places:
    """Where an adapter stands.

    Args:
        config ([`PillConfig`]): Its config; names given there come first.
        model_config (`dict`): The base model's config.

    Returns:
        [`Places`]

    Raises:
        ValueError: The architecture is not known or has no such places.
        NotImplementedError: A gate is wanted, but there is no projection that makes values only.
    """
    text = text_config_of(model_config)
    model_type = str(text.get("model_type"))
    kind = re.sub(r"^(upcycled_|moe_)|_text$", "", "llama" if model_type == "moe_plus_plus" else model_type)
    given = {
        name: getattr(config, name)
        for name in ("attention_norm", "feedforward_norm", "value_projection")
        if getattr(config, name) is not None
    }
    if not {"attention_norm", "feedforward_norm"} <= given.keys():
        reason = _ONE_NORM if text.get("use_parallel_residual") and kind == "stablelm" else _REFUSED.get(kind)
        if reason is not None:
            raise ValueError(f"PILL cannot adapt a model of type {model_type!r}: {reason}.")
        if kind not in KNOWN:
            raise ValueError(
                f"PILL does not know the layers of model type {model_type!r}. Name the modules with "
                "`PillConfig(attention_norm=..., feedforward_norm=..., value_projection=...)`, as "
                f"'input_layernorm', 'post_attention_layernorm' and 'v_proj' are in Llama. Known: {sorted(KNOWN)}."
            )
    known = KNOWN.get(kind, Places("", "", None))
    places = Places(**{**vars(known), **given})
    if config.attention_gate and places.value_projection is None:
        raise NotImplementedError(
            f"`attention_gate=True` needs a linear layer that makes the values and nothing else; model type "
            f"{model_type!r} makes queries, keys and values in one layer (or `value_projection` was not given). "
            "Pass `attention_gate=False`."
        )
    return places
