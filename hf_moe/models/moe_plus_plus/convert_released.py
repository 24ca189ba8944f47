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

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_moe.checkpoints import CheckpointReader, CheckpointWriter
from hf_moe.hub import write_shim
from hf_moe.models.moe_plus_plus import MoePlusPlusConfig
from hf_moe.weights.hub import fetch_from_hub


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
OTHER_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model")
NOT_WEIGHTS = ("rotary_emb.inv_freq",)


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
    source = Path(source) if Path(source).expanduser().exists() else fetch_from_hub(os.fspath(source))
    source = source.expanduser()
    config = released_config(_read_config(source))
    shapes = _expected_shapes(config)
    reader = CheckpointReader(source)
    pieces = {name: _pieces(name, config) for name in shapes}
    _check_keys(reader, pieces, config)
    with CheckpointWriter(destination, max_shard_bytes) as writer:
        for name, shape in logging.tqdm(shapes.items(), desc="Converting", unit="tensor"):
            tensor = _assemble(reader, pieces[name], shape)
            if tensor.shape != shape:
                raise ValueError(
                    f"`{source}`: `{pieces[name][0]}` makes a tensor of shape {tuple(tensor.shape)}, but "
                    f"`config.json` asks for {tuple(shape)}. They belong to different models: download both again."
                )
            if name.endswith("experts.down_proj"):
                config.dtype = tensor.dtype
            writer.add(name, tensor)
        for layer in config.moe_layer_indices:
            writer.add(f"model.layers.{layer}.mlp.gate.temperature", torch.ones(()))
        config.architectures = ["MoePlusPlusForCausalLM"]
        write_shim(writer.partial, config)
        config.save_pretrained(writer.partial)
        for pattern in OTHER_FILES:
            for path in source.glob(pattern):
                shutil.copyfile(path, writer.partial / path.name)
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
    path = source / "config.json"
    try:
        released = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"`{source}` has no `config.json`, so it is not a model folder. Give one that has."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` cannot be read. Download or copy it again.") from error
    if not isinstance(released, dict) or released.get("model_type") != "MoE++":
        kind = released.get("model_type") if isinstance(released, dict) else None
        raise ValueError(
            f"`{source}` has `model_type` {kind!r}, but the released MoE++ layout has 'MoE++'. Give a checkpoint with "
            "the files of Chat-UniVi/MoE-Plus-Plus-7B."
        )
    return released


def _expected_shapes(config: MoePlusPlusConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor to write, in layer order."""
    from hf_moe.models.moe_plus_plus import MoePlusPlusForCausalLM

    with torch.device("meta"):
        model = MoePlusPlusForCausalLM(config)
    parameters = model.named_parameters()  # a tied head appears once
    return {name: parameter.shape for name, parameter in parameters}


def _pieces(name: str, config: MoePlusPlusConfig) -> list[str]:
    """The released tensors that make the tensor `name`; several are stacked."""
    block, dot, own = name.partition(".mlp.")
    if not dot or not own.startswith(("gate.", "experts.", "zero_experts.")):
        return [name]
    gate, expert = f"{block}.mlp.moe.gate", f"{block}.mlp.moe.experts.experts"
    feed_forward = range(config.num_experts)
    constant = range(config.num_experts, config.num_experts + NUM_CONSTANT)
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


def _assemble(reader: CheckpointReader, names: list[str], shape: torch.Size) -> torch.Tensor:
    tensors = [reader[name] for name in names]
    if len(shape) == tensors[0].dim():
        return tensors[0]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ValueError(f"The experts `{names[0]}` to `{names[-1]}` have different shapes. Download the files again.")
    return torch.stack(tensors)


def _check_keys(reader: CheckpointReader, pieces: dict[str, list[str]], config: MoePlusPlusConfig) -> None:
    wanted = {name for names in pieces.values() for name in names}
    missing = sorted(wanted - reader.keys())
    if missing:
        raise ValueError(
            f"`{reader.folder}` lacks {len(missing)} tensors of the released layout, the first is `{missing[0]}`. "
            "The files are incomplete, or `config.json` belongs to another model: download them again."
        )
    # Every router of the released code owns a map for the residual; the first one never uses it.
    unused = {f"model.layers.{config.moe_layer_indices[0]}.mlp.moe.gate.gate_map.weight"}
    unused |= {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = sorted(key for key in reader.keys() - wanted - unused if not key.endswith(NOT_WEIGHTS))
    if extra:
        raise ValueError(
            f"`{reader.folder}` has {len(extra)} tensors the released layout does not have, first `{extra[0]}`. "
            "Check that `config.json` belongs to these weights (`moe_2layer_gate`, `num_experts`, "
            "`num_hidden_layers`, `moe_expert_interval`)."
        )
