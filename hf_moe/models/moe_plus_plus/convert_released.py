"""Turns the released MoE++ checkpoint (Chat-UniVi/MoE-Plus-Plus-7B, remote code) into a `moe_plus_plus` one.

The released layout, with l the layer and e the expert; the last four experts are constant, constant, copy, zero:

| released, under `layers.l.mlp.moe` | here, under `layers.l.mlp` |
|---|---|
| `gate.wg.weight` (N, D) | `gate.weight` |
| `gate.wg.0.weight` (8N, D), `gate.wg.2.weight` (N, 8N) | `gate.hidden_weight`, `gate.weight` |
| `gate.gate_map.weight` (N, N), absent or unused in the first MoE layer | `gate.residual_weight` |
| `experts.experts.e.up_proj.weight` (2I, D), gate half first | `experts.gate_up_proj` |
| `experts.experts.e.down_proj.weight` (D, I) | `experts.down_proj` |
| `experts.experts.e.constant` (D,) | `zero_experts.constants` |
| `experts.experts.e.wg.weight` (2, D) | `zero_experts.constant_gate` |

Everything else is named as in Llama.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_moe.models.moe_plus_plus import MoePlusPlusConfig
from hf_moe.models.released import find_released, read_released_config, write_converted


__all__ = ["convert_released", "released_config"]

logger = logging.get_logger(__name__)

NUM_CONSTANT, NUM_COPY, NUM_ZERO = 2, 1, 1
# Fields that mean the same here; all others are translated or checked below.
SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


def convert_released(
    source: str | os.PathLike, destination: str | os.PathLike, *, max_shard_bytes: int = 2 * 10**9
) -> Path:
    """Writes a released MoE++ checkpoint as a `moe_plus_plus` model folder that `AutoModelForCausalLM` loads.

    Works a tensor at a time: memory holds one shard and one layer. The folder appears when it is complete, or not at
    all. Values and their dtypes are copied; nothing is rounded.

    Note: in half precision the outputs differ from the released code by rounding: it maps the residual logits in the
    dtype of the checkpoint, here routers work in float32. Note: training settings are not part of the release; the
    paper's are set (tau 0.75, capacity factor 1.1, balance loss 0.01).

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id of a checkpoint in the released layout, safetensors or
            `pytorch_model*.bin`.
        destination (`str` or `os.PathLike`): The folder to make; it may exist if it is empty.
        max_shard_bytes (`int`, defaults to 2 GB): Largest size of one weight file.

    Returns:
        `Path`: `destination`.

    Raises:
        ValueError: not the released layout, tensors missing, of another shape or too many, a damaged file, or a
            destination that exists or cannot be written.

    Example:

    ```python
    >>> convert_released("Chat-UniVi/MoE-Plus-Plus-7B", "moe-plus-plus-7b")
    >>> model = AutoModelForCausalLM.from_pretrained("moe-plus-plus-7b", dtype="auto")
    ```
    """
    from hf_moe.models.moe_plus_plus import MoePlusPlusForCausalLM

    source = find_released(source)
    config = released_config(_read_config(source))
    layers = config.moe_layer_indices
    write_converted(
        source,
        destination,
        config,
        MoePlusPlusForCausalLM,
        lambda name: _pieces(name, config),
        buffers={f"model.layers.{layer}.mlp.gate.temperature": torch.ones(()) for layer in layers},
        # Every router of the released code owns a map for the residual; the first one never uses it.
        unused=[f"model.layers.{layers[0]}.mlp.moe.gate.gate_map.weight"],
        deciding_fields=("moe_2layer_gate", "num_experts", "num_hidden_layers", "moe_expert_interval"),
        max_shard_bytes=max_shard_bytes,
    )
    logger.info(f"Wrote {destination}.")
    return Path(destination)


def released_config(released: dict[str, Any]) -> MoePlusPlusConfig:
    """Translates the released `config.json`.

    Args:
        released (`dict`): Its content. Missing fields have the released code's defaults.

    Returns:
        [`MoePlusPlusConfig`] with the router `moepp_release`.

    Raises:
        ValueError: a field has a value that the released code, or this one, does not support.
    """
    total = released.get("num_experts")
    total = total[0] if isinstance(total, list) and len(total) == 1 else total
    special = NUM_CONSTANT + NUM_COPY + NUM_ZERO
    if not isinstance(total, int) or total <= special:
        raise ValueError(
            f"`num_experts` of a released MoE++ config counts all experts, {special} of them without feed-forward, as "
            f"`[n]`; got {released.get('num_experts')!r}. Give a checkpoint with `model_type` 'MoE++'."
        )
    for name, allowed in (("hidden_act", "silu"), ("sliding_window", None), ("rotary_percent", 1.0)):
        if released.get(name, allowed) != allowed:
            raise ValueError(f"`{name}={released[name]!r}` is not supported: released checkpoints have {allowed!r}.")
    interval = released.get("moe_expert_interval", 1)
    mixtral_gating = released.get("moe_use_mixtral_gating", False)
    use_norm = released.get("moe_use_logits_norm", False)
    fields = {
        **{name: released[name] for name in SAME_FIELDS if name in released},
        "rope_parameters": _rope_parameters(released),
        "num_experts": total - special,
        "num_constant_experts": NUM_CONSTANT,
        "num_copy_experts": NUM_COPY,
        "num_zero_experts": NUM_ZERO,
        "num_experts_per_tok": 2,
        "moe_layers": "all" if interval == 1 else f"every:{interval}",
        "router_type": "moepp_release",
        "router_config": {
            "num_layers_gate": 2 if released.get("moe_2layer_gate", True) else 1,
            "mixtral_gating": mixtral_gating,
            "logit_norm_std": float(released.get("moe_gate_norm_std", 1.0)) if use_norm else None,
        },
        "scale_expert_input": not (mixtral_gating or released.get("moe_feature_no_mul_topk", False)),
    }
    return MoePlusPlusConfig(**fields)


def _rope_parameters(released: dict[str, Any]) -> dict[str, Any]:
    theta = float(released.get("rope_theta", 10000.0))
    scaling = released.get("rope_scaling")
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    kind, factor = scaling.get("type"), scaling.get("factor")
    if kind in ("linear", "dynamic"):
        return {"rope_type": kind, "rope_theta": theta, "factor": float(factor)}
    if kind == "ntk":  # the released code's own: a larger base, nothing else
        return {"rope_type": "default", "rope_theta": theta * float(factor)}
    raise ValueError(f"`rope_scaling` of type {kind!r} is not supported: released code knows linear, dynamic and ntk.")


def _read_config(source: Path) -> dict[str, Any]:
    released = read_released_config(source)
    if not isinstance(released, dict) or released.get("model_type") != "MoE++":
        kind = released.get("model_type") if isinstance(released, dict) else None
        raise ValueError(
            f"`{source}` has `model_type` {kind!r}, but the released MoE++ layout has 'MoE++'. Give a checkpoint with "
            "the files of Chat-UniVi/MoE-Plus-Plus-7B."
        )
    return released


def _pieces(name: str, config: MoePlusPlusConfig) -> list[str]:
    """The released tensors that make the tensor `name`; several are stacked."""
    block, dot, own = name.partition(".mlp.")
    if not dot or not own.startswith(("gate.", "experts.", "zero_experts.")):
        return [name]
    gate, expert = f"{block}.mlp.moe.gate", f"{block}.mlp.moe.experts.experts"
    num_experts = config.experts_per_layer[0]
    feed_forward, constant = range(num_experts), range(num_experts, num_experts + NUM_CONSTANT)
    two_layers = config.router_config["num_layers_gate"] == 2
    return {
        "gate.hidden_weight": [f"{gate}.wg.0.weight"],
        "gate.weight": [f"{gate}.wg.2.weight" if two_layers else f"{gate}.wg.weight"],
        "gate.residual_weight": [f"{gate}.gate_map.weight"],
        "experts.gate_up_proj": [f"{expert}.{e}.up_proj.weight" for e in feed_forward],
        "experts.down_proj": [f"{expert}.{e}.down_proj.weight" for e in feed_forward],
        "zero_experts.constants": [f"{expert}.{e}.constant" for e in constant],
        "zero_experts.constant_gate": [f"{expert}.{e}.wg.weight" for e in constant],
    }[own]
