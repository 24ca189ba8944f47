"""Turns a released Dynamic_MoE checkpoint (AnLan577/Dynamic_MoE, remote code) into a `dynamic_moe` one.

The released layout, with l the layer and e the expert:

| released, under `layers.l` | here, under `layers.l` |
|---|---|
| `mlp.router.weight` (N, D) | `mlp.gate.weight` |
| `mlp.experts.e.gate_proj.weight`, `mlp.experts.e.up_proj.weight` (I, D) | `mlp.experts.gate_up_proj` (N, 2I, D) |
| `mlp.experts.e.down_proj.weight` (D, I) | `mlp.experts.down_proj` |
| `mlp.mlp.{gate,up,down}_proj.weight`, of dense layers | `mlp.{gate,up,down}_proj.weight` |
| `input_norm.weight`, `post_attention_norm.weight` | `input_layernorm.weight`, `post_attention_layernorm.weight` |

Everything else is named as in Llama.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_moe.models.dynamic_moe import DynamicMoeConfig
from hf_moe.models.released import find_released, read_released_config, write_converted


__all__ = ["convert_released", "released_config"]

logger = logging.get_logger(__name__)

# Fields that mean the same here, with the released code's defaults where they are not Llama's of today.
SAME_FIELDS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
NORMS = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}


def convert_released(
    source: str | os.PathLike, destination: str | os.PathLike, *, max_shard_bytes: int = 2 * 10**9
) -> Path:
    """Writes a released Dynamic_MoE checkpoint as a `dynamic_moe` model folder that `AutoModelForCausalLM` loads.

    Works a tensor at a time: memory holds one shard and one layer. The folder appears when it is complete, or not at
    all. Values and their dtypes are copied; nothing is rounded.

    Note: outputs differ from the released code's where p lies within rounding of a sum of probabilities: it takes one
    expert more where a sum is p exactly, and it adds up in the dtype of the checkpoint, here routers work in float32.
    Note: coefficients of the losses are not part of the release; the defaults of [`DynamicMoeConfig`] are set.

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
    >>> convert_released("AnLan577/Dynamic_MoE", "dynamic-moe")
    >>> model = AutoModelForCausalLM.from_pretrained("dynamic-moe", dtype="auto")
    ```
    """
    from hf_moe.models.dynamic_moe import DynamicMoeForCausalLM

    source = find_released(source)
    released = read_released_config(source)
    config = released_config(released)
    gates = [f"model.layers.{layer}.mlp.gate" for layer in config.moe_layer_indices]
    buffers = {f"{gate}.temperature": torch.ones(()) for gate in gates}
    buffers |= {f"{gate}.p": torch.tensor(config.router_config["p"]) for gate in gates}
    write_converted(
        source,
        destination,
        config,
        DynamicMoeForCausalLM,
        lambda name: _pieces(name, config),
        buffers=buffers,
        deciding_fields=("num_experts", "num_hidden_layers", "expert_frequency"),
        max_shard_bytes=max_shard_bytes,
    )
    logger.info(f"Wrote {destination}.")
    return Path(destination)


def released_config(released: Any) -> DynamicMoeConfig:
    """Translates the released `config.json`.

    The released code reads neither `num_key_value_heads` nor anything about rotary embeddings: it has as many key as
    query heads, and base 10000.

    Args:
        released (`dict`): Its content. Missing fields have the released code's defaults.

    Returns:
        [`DynamicMoeConfig`]

    Raises:
        ValueError: a field has a value that the released code does not support.

    Example:

    ```python
    >>> released_config({"num_experts": 16, "top_p_threshold": 0.4}).moe_layer_indices[:3]
    [0, 2, 4]
    ```
    """
    num_experts = released.get("num_experts") if isinstance(released, dict) else None
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(
            f"`num_experts` of a released Dynamic_MoE config must be a whole number above 0, got {num_experts!r}. "
            "Give a checkpoint with the files of AnLan577/Dynamic_MoE."
        )
    frequency, p = released.get("expert_frequency", 2), released.get("top_p_threshold", 0.4)
    if not isinstance(frequency, int) or frequency < 1:
        raise ValueError(f"`expert_frequency` must be a whole number above 0, got {frequency!r}.")
    fields = {name: released.get(name, default) for name, default in SAME_FIELDS.items()}
    return DynamicMoeConfig(
        **fields,
        num_key_value_heads=fields["num_attention_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_experts=num_experts,
        moe_layers=f"every:{frequency}:0",
        router_config={"p": float(p)},
    )


def _pieces(name: str, config: DynamicMoeConfig) -> list[str | tuple[str, ...]]:
    """The released tensors that make the parameter `name`."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return [name]
    number, own = int(layer[1]), layer[2]
    prefix, (module, _, rest) = f"model.layers.{number}", own.partition(".")
    if module in NORMS:
        return [f"{prefix}.{NORMS[module]}.{rest}"]
    if module != "mlp":
        return [name]
    if number not in config.moe_layer_indices:
        return [f"{prefix}.mlp.mlp.{rest}"]
    experts = [f"{prefix}.mlp.experts.{e}" for e in range(config.experts_per_layer[0])]
    if rest == "gate.weight":
        return [f"{prefix}.mlp.router.weight"]
    if rest == "experts.gate_up_proj":
        return [(f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight") for expert in experts]
    return [f"{expert}.down_proj.weight" for expert in experts]
