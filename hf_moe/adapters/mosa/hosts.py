"""Where the styles sit in the architectures of transformers: the modules they adapt, and the norms before them."""

from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D


__all__ = ["HOSTS", "Host", "family_targets", "residual_source", "width"]


class Host(NamedTuple):
    """Names of an architecture's modules.

    `feed_forward` is the block, or the last linear layer of a feed-forward that is no module of its own; `not_these`
    end on the same name and are none.
    """

    feed_forward: str = "mlp"
    attention: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "v_proj")
    not_these: tuple[str, ...] = ()
    is_block: bool = True


_BERT = Host("output.dense", "attention.output.dense", ("query", "value"), ("attention.output.dense",), False)
_VIT = Host(attention="attention")
HOSTS: dict[str, Host] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "olmoe"), Host()
    ),
    **dict.fromkeys(("vit", "swin", "deit"), _VIT),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
    "clip_vision_model": Host(),
    "gpt2": Host(attention="attn", projections=("c_attn",)),
    "opt": Host(feed_forward="fc2", is_block=False),
    "phi": Host(),
    "siglip_vision_model": Host(),
    "t5": Host("DenseReluDense", "SelfAttention", ("q", "v")),
}

# From the module that holds the adapted one, to the module whose input is the residual stream; the first there is.
_FEED_FORWARD_SOURCES = (
    "pre_feedforward_layernorm",
    "layernorm_after",
    "post_attention_layernorm",
    "ln_2",
    "layer_norm2",
    "norm2",
    "final_layer_norm",
    "layer_norm",
    "intermediate",
)
_ATTENTION_SOURCES = (
    "layernorm_before",
    "input_layernorm",
    "ln_1",
    "self_attn_layer_norm",
    "layer_norm1",
    "norm1",
    "layer_norm",
)


def family_targets(style: str, model_type: str) -> tuple[list[str], list[str], str] | None:
    """What a style adapts in an architecture.

    Args:
        style (`str`): `"parallel"`, `"pfeiffer"`, `"houlsby"` or `"lora"`.
        model_type (`str`): As in the model's config.

    Returns:
        Names to adapt, names to leave out, and what a parallel adapter reads; `None` if the architecture is not known.
    """
    host = HOSTS.get(model_type)
    if host is None:
        return None
    reads = "block" if host.is_block else "residual"
    if style == "lora":
        return list(host.projections), [], "block"
    if style == "houlsby":
        return sorted({host.feed_forward, host.attention}), [], "block"
    return [host.feed_forward], list(host.not_these), reads


def residual_source(model: nn.Module, key: str) -> nn.Module:
    """The module whose input is the residual stream that the adapted block's output is added to.

    Args:
        model (`nn.Module`): The base model.
        key (`str`): Path of the adapted module.

    Returns:
        `nn.Module`: The norm before the block, or, where the norm follows the addition, the block's first part.

    Raises:
        ValueError: No module of a known name is beside the adapted one.
    """
    path, _, name = key.rpartition(".")
    parent: Any = model.get_submodule(path)
    if name == "dense" and not hasattr(parent, "intermediate"):  # BERT: <layer>.output.dense
        parent = model.get_submodule(path.rpartition(".")[0])
    if name == "fc2" and not getattr(parent, "do_layer_norm_before", True):  # OPT-350m: the norm comes last
        return parent.fc1
    sources = _ATTENTION_SOURCES if "att" in name.lower() else _FEED_FORWARD_SOURCES
    for source in sources:
        if isinstance(getattr(parent, source, None), nn.Module):
            return getattr(parent, source)
    raise ValueError(
        f"`adapter_input='residual'` needs the norm before {key!r}, but beside it there is none of {list(sources)}. "
        "Use `adapter_input='block'`, which reads what the module itself reads."
    )


def width(module: nn.Module, hidden_size: int | None) -> tuple[int, int]:
    """Sizes of a module's input and output.

    Args:
        module (`nn.Module`): A linear layer, or a block whose output is as wide as its input.
        hidden_size (`int`, *optional*): Of the model, for blocks without linear layers, such as stacked experts.

    Returns:
        `tuple[int, int]`

    Raises:
        ValueError: They cannot be told.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    for inner in module.modules():
        if isinstance(inner, (nn.Linear, Conv1D)):
            size, _ = width(inner, None)
            return size, size
    if hidden_size is None:
        raise ValueError(
            f"The width of {type(module).__name__} cannot be told. Name linear layers, or blocks that hold some, in "
            "`target_modules`."
        )
    return hidden_size, hidden_size
