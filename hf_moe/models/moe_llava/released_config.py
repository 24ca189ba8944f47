"""The `config.json` of released MoE-LLaVA checkpoints in the words of `MoeLlavaConfig`."""

from typing import Any

from .configuration_moe_llava import paper_fields


__all__ = ["released_text_config"]

# Released type -> backbone here.
TYPES = {
    "moe_llava_llama": "moe_llama",
    "moe_llava_mistral": "moe_llama",
    "moe_llava_phi": "moe_phi",
    "moe_llava_qwen1_5": "moe_qwen2",
    "moe_llava_stablelm": "moe_stablelm",
}
WITHOUT_BACKBONE = {"moe_llava_qwen": "Qwen-1", "moe_llava_minicpm": "MiniCPM"}
# Fields that mean the same here; what is left out has the released code's default.
SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "layer_norm_eps",
    "use_qkv_bias",
    "qk_layernorm",
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# What StableLM's own configuration assumes where a field is left out.
STABLELM = {"use_qkv_bias": True, "rope_pct": 0.25, "norm_eps": 1e-5}


def released_text_config(released: Any) -> dict[str, Any]:
    """Fields of the text config, `model_type` among them.

    Args:
        released (`dict`): Content of the released `config.json`.

    Returns:
        `dict`

    Raises:
        ValueError: another kind of model, a language model without a backbone here, or settings that the released
            code, or this one, does not have.
    """
    kind: Any = released.get("model_type") if isinstance(released, dict) else None
    if kind in WITHOUT_BACKBONE:
        raise ValueError(
            f"`model_type` is {kind!r}: its language model, {WITHOUT_BACKBONE[kind]}, has no backbone here. Released "
            f"checkpoints of {sorted(TYPES)} can be read."
        )
    moe = released.get("moe") if kind in TYPES else None
    if not isinstance(moe, dict) or not moe.get("moe_enable", True) or not moe.get("moe_layers_idx"):
        raise ValueError(
            f"`config.json` has `model_type` {kind!r} and `moe` {moe!r}, but a released MoE-LLaVA has one of "
            f"{sorted(TYPES)} and an entry `moe` with `moe_layers_idx`. Give a checkpoint with the files of "
            "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e or of one of its kind."
        )
    for name, allowed in (("mm_video_tower", None), ("image_projector_type", "mlp2x_gelu"), ("rope_scaling", None)):
        if released.get(name, allowed) != allowed:
            raise ValueError(f"`{name}={released[name]!r}` is not supported: released checkpoints have {allowed!r}.")
    if not released.get("mm_image_tower"):
        raise ValueError("`mm_image_tower` is missing from `config.json`: it names the vision tower.")
    fields = {name: released[name] for name in SAME_FIELDS if released.get(name) is not None}
    for name in SAME_FIELDS[:5]:
        if name not in fields:
            raise ValueError(f"`{name}` is missing from `config.json`. Download it again.")
    rotary = {"rope_type": "default", "rope_theta": float(released.get("rope_theta", 10000.0))}
    if kind == "moe_llava_stablelm":
        own = {**STABLELM, **released}
        fields |= {"layer_norm_eps": own["norm_eps"], "use_qkv_bias": own["use_qkv_bias"]}
        rotary["partial_rotary_factor"] = own["rope_pct"]
    elif kind == "moe_llava_phi":
        rotary["partial_rotary_factor"] = released.get("partial_rotary_factor", 0.5)
    if released.get("sliding_window") and released.get("use_sliding_window", kind == "moe_llava_mistral"):
        # The same up to its length; the release was trained on less.
        fields["max_position_embeddings"] = released["sliding_window"]
    return {"model_type": TYPES[kind], **fields, "rope_parameters": rotary, **_moe_fields(moe, fields)}


def _moe_fields(moe: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    layers, top_k = sorted(moe["moe_layers_idx"]), moe.get("top_k_experts", 2)
    counts = moe.get("num_experts", 4)
    counts = counts if isinstance(counts, list) else [counts]
    counts = counts * len(layers) if len(counts) == 1 else counts
    if top_k not in (1, 2):
        raise ValueError(f"`moe['top_k_experts']` must be 1 or 2, as in the released code, got {top_k!r}.")
    # A single expert is weighed with its probability, two with theirs divided by the sum.
    options = {"norm_topk_prob": top_k == 2, "norm_survivors": top_k == 2, "balance_first_choice": True}
    coefficient = moe.get("router_aux_loss_coef", 0.01)
    return paper_fields(
        fields["num_hidden_layers"],
        num_experts=counts[0] if len(set(counts)) == 1 else counts,
        num_experts_per_tok=top_k,
        moe_layers=layers,
        expert_capacity_factor=moe.get("capacity_factor", 1.0),
        residual_expert=bool(moe.get("use_residual", False)),
        router_aux_loss_coef=coefficient * len(layers),
        router_config={**options, "min_capacity": moe.get("min_capacity", 4)},
    )
