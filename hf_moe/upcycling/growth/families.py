"""Which units the axes of each weight belong to, family by family: the one thing growth has to know about a model."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


__all__ = ["DERIVED_HEAD_DIM", "FAMILIES", "Axes", "axes_of", "growable_families", "is_input_first", "layer_of"]


class Axes(NamedTuple):
    """Units on both sides of a map.

    Args:
        inputs (`str`, *optional*): What it reads; `None` for what never grows (vocabulary, labels) and for vectors.
        outputs (`str`, *optional*): What it writes; for a norm, what it scales.
        is_final_norm (`bool`, defaults to `False`): The norm in front of the head.

    Units: `hidden` (coordinates of the residual stream), `inner` (feed-forward channels), `heads`, `kv` (heads times
    head size), and the fused `qkv`, `head_qkv` (interleaved head by head) and `gate_up`.
    """

    inputs: str | None
    outputs: str | None
    is_final_norm: bool = False


NORM = Axes(None, "hidden")
FINAL_NORM = Axes(None, "hidden", is_final_norm=True)

LLAMA = {
    "embed_tokens": Axes(None, "hidden"),
    "self_attn.q_proj": Axes("hidden", "heads"),
    "self_attn.k_proj": Axes("hidden", "kv"),
    "self_attn.v_proj": Axes("hidden", "kv"),
    "self_attn.o_proj": Axes("heads", "hidden"),
    "mlp.gate_proj": Axes("hidden", "inner"),
    "mlp.up_proj": Axes("hidden", "inner"),
    "mlp.down_proj": Axes("inner", "hidden"),
    "input_layernorm": NORM,
    "post_attention_layernorm": NORM,
    "norm": FINAL_NORM,
    "lm_head": Axes("hidden", None),
    "score": Axes("hidden", None),
}
HEAD_NORMS = {"self_attn.q_norm": Axes(None, None), "self_attn.k_norm": Axes(None, None)}  # over one head each
OLMO2 = {
    **LLAMA,
    "self_attn.q_norm": Axes(None, "heads"),  # over all heads
    "self_attn.k_norm": Axes(None, "kv"),
    "post_feedforward_layernorm": NORM,
}
PHI = {
    **LLAMA,
    "self_attn.dense": Axes("heads", "hidden"),
    "mlp.fc1": Axes("hidden", "inner"),
    "mlp.fc2": Axes("inner", "hidden"),
    "final_layernorm": FINAL_NORM,
}
PHI3 = {**LLAMA, "self_attn.qkv_proj": Axes("hidden", "qkv"), "mlp.gate_up_proj": Axes("hidden", "gate_up")}
STARCODER2 = {**LLAMA, "mlp.c_fc": Axes("hidden", "inner"), "mlp.c_proj": Axes("inner", "hidden")}
GPT2 = {
    "wte": Axes(None, "hidden"),
    "wpe": Axes(None, "hidden"),
    "attn.c_attn": Axes("hidden", "qkv"),
    "attn.c_proj": Axes("heads", "hidden"),
    "mlp.c_fc": Axes("hidden", "inner"),
    "mlp.c_proj": Axes("inner", "hidden"),
    "ln_1": NORM,
    "ln_2": NORM,
    "ln_f": FINAL_NORM,
    "lm_head": Axes("hidden", None),
    "score": Axes("hidden", None),
}
GPT_NEOX = {
    "embed_in": Axes(None, "hidden"),
    "attention.query_key_value": Axes("hidden", "head_qkv"),
    "attention.dense": Axes("heads", "hidden"),
    "mlp.dense_h_to_4h": Axes("hidden", "inner"),
    "mlp.dense_4h_to_h": Axes("inner", "hidden"),
    "input_layernorm": NORM,
    "post_attention_layernorm": NORM,
    "final_layer_norm": FINAL_NORM,
    "embed_out": Axes("hidden", None),
    "lm_head": Axes("hidden", None),
    "score": Axes("hidden", None),
}

FAMILIES: dict[str, dict[str, Axes]] = {
    "arcee": LLAMA,
    "ernie4_5": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "granite": LLAMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "olmo": LLAMA,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, **HEAD_NORMS},
    "seed_oss": LLAMA,
    "smollm3": LLAMA,
    "starcoder2": STARCODER2,
}
#: Families whose head size is `hidden_size / num_attention_heads`, whatever the config says; with as many key-value
#: heads as query heads.
DERIVED_HEAD_DIM = ("gpt2", "gpt_neox")


def growable_families() -> list[str]:
    """Model types [`grow_model`] takes, sorted."""
    return sorted(FAMILIES)


def axes_of(model_type: str, name: str) -> Axes:
    """The units of one parameter.

    Args:
        model_type (`str`): Family.
        name (`str`): Full name, `"model.layers.3.mlp.up_proj.weight"`.

    Returns:
        [`Axes`]

    Raises:
        ValueError: the table of the family does not have it.
    """
    table, path = FAMILIES[model_type], name.split(".")[:-1]
    for known in (".".join(path[-2:]), path[-1]):
        if known in table:
            return table[known]
    raise ValueError(
        f"`{name}` is not in the growth table of {model_type!r}, so nothing is known about its axes. Families are "
        "tables in `hf_moe/upcycling/growth/families.py`; the variant of this config has no entry."
    )


def layer_of(name: str) -> int | None:
    """Number of the layer a parameter is in, `None` outside of the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_input_first(model: nn.Module, name: str) -> bool:
    """Whether a matrix is stored `(inputs, outputs)`, as embeddings and GPT-2's `Conv1D` are."""
    module: torch.nn.Module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, (nn.Embedding, Conv1D))
