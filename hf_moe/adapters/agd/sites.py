"""Where adapters go in a denoiser, and what of its conditions can be read off its modules."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import CONDITIONS, AgdConfig


__all__ = ["REFERENCE_SITES", "block_sizes", "default_sites", "output_projection", "resolve_conditions"]

# The authors' code visits as many attentions of an up block as of a down block, and an up block has one more.
_FIRST = r"(down|up)_blocks\.\d+\.attentions\.[01]|mid_block\.attentions\.0"
#: Regular expressions for `target_modules`, by class name: the sites the authors' code adapts (13 of the 16 of SD 2.1,
#: 58 of the 70 of SDXL). Everywhere else theirs and ours are the same.
REFERENCE_SITES = {"UNet2DConditionModel": rf"(.*\.)?({_FIRST})\.transformer_blocks\.\d+\.attn2"}

_SITES = {
    "DiTTransformer2DModel": ["attn1"],
    "FluxTransformer2DModel": ["attn"],
    "PixArtTransformer2DModel": ["attn2"],
    "SD3Transformer2DModel": ["attn"],
    "UNet2DConditionModel": ["attn2"],
}
_PROMPT_SIZES = ("encoder_hid_dim", "joint_attention_dim", "caption_channels", "cross_attention_dim")
_OUTPUTS = ("to_out", "out_proj", "o_proj", "c_proj", "proj")
SINUSOID_SIZE = 256


def default_sites(model: nn.Module) -> list[str] | None:
    """Names of the blocks to adapt in a known denoiser, or `None`."""
    return next((_SITES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _SITES), None)


def resolve_conditions(model: nn.Module, config: AgdConfig) -> None:
    """Fills in what the config leaves to the model: which conditions there are, where they come from, their widths.

    Args:
        model (`nn.Module`): The base model.
        config ([`AgdConfig`]): Changed in place.

    Raises:
        ValueError: A condition is asked for that the model does not show; nothing is changed then.
    """
    modules = _embedding_modules(model) | (config.condition_modules or {})
    if config.timestep_embedding == "sinusoid":
        modules.pop("timestep", None)
    sizes: dict[str, int] = {}
    for name, path in modules.items():
        size = _output_size(_submodule(model, path, name))
        if size is not None:
            sizes[name] = size
    prompt = _prompt_size(model)
    if prompt is not None:
        sizes["prompt"] = prompt
    for name, size in (config.condition_sizes or {}).items():
        if sizes.setdefault(name, size) != size:
            raise ValueError(
                f"`condition_sizes` says that {name!r} has width {size}, but in {type(model).__name__} it has "
                f"{sizes[name]}."
            )
    names = config.condition_on
    if names is None:
        names = tuple(name for name in CONDITIONS if name == "scale" or name in sizes)
    if "timestep" in names and "timestep" not in modules:
        if config.timestep_embedding == "base":
            raise ValueError(
                f"`timestep_embedding='base'`, but no timestep embedding was found in {type(model).__name__}. Name "
                "its module, as in `condition_modules={'timestep': 'time_embedding'}`, or choose 'sinusoid'."
            )
        sizes.setdefault("timestep", SINUSOID_SIZE)
    for name in names[1:]:
        if name not in sizes:
            raise ValueError(
                f"`condition_on` has {name!r}, whose width cannot be read off {type(model).__name__}. Give it, as in "
                f"`condition_sizes={{{name!r}: 256}}`, or leave {name!r} out."
            )
    config.condition_on = names
    config.condition_modules = {name: path for name, path in modules.items() if name in names}
    config.condition_sizes = {name: sizes[name] for name in names[1:]}
    if config.timestep_embedding is None and "timestep" in names:
        config.timestep_embedding = "base" if "timestep" in modules else "sinusoid"


def block_sizes(block: nn.Module, config: AgdConfig, path: str) -> tuple[int, int]:
    """Widths of a block's input and output.

    Args:
        block (`nn.Module`): The attention block.
        config ([`AgdConfig`]): Its `block_size` wins.
        path (`str`): For the error.

    Returns:
        `tuple[int, int]`

    Raises:
        ValueError: They cannot be found.
    """
    if config.block_size is not None:
        return config.block_size, config.block_size
    if isinstance(getattr(block, "query_dim", None), int) and isinstance(getattr(block, "out_dim", None), int):
        return block.query_dim, block.out_dim  # pyright: ignore[reportReturnType]
    if isinstance(block, nn.MultiheadAttention):
        return block.embed_dim, block.embed_dim
    linears = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
    if not linears:
        raise ValueError(f"The width of {path!r} is unknown: it has no linear layer. Give `block_size`.")
    first, last = _linear_sizes(linears[0]), _linear_sizes(linears[-1])
    return first[0], last[1]


def output_projection(block: nn.Module, path: str) -> tuple[Any, float]:
    """The layer that a block ends with, and by what its output is divided afterwards.

    Args:
        block (`nn.Module`): The attention block.
        path (`str`): For the error.

    Returns:
        `tuple[nn.Module, float]`

    Raises:
        NotImplementedError: It is not known which layer that is.
    """
    found = next((getattr(block, name) for name in _OUTPUTS if hasattr(block, name)), block)
    if isinstance(found, (nn.ModuleList, nn.Sequential)):
        found = found[0]
    if hasattr(found, "get_base_layer"):
        found = found.get_base_layer()  # pyright: ignore[reportCallIssue]
    if not isinstance(found, (nn.Linear, Conv1D)):
        raise NotImplementedError(
            f"{path!r} ({type(block).__name__}) does not say which layer it ends with, so nothing can be folded into "
            f"that layer's bias. Known names: {', '.join(_OUTPUTS)}."
        )
    return found, float(getattr(block, "rescale_output_factor", 1.0))


def _embedding_modules(model: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind == "TimestepEmbedding" and path.rpartition(".")[2] in ("time_embedding", "timestep_embedder"):
            found.setdefault("timestep", path)
        elif kind == "LabelEmbedding" or (path == "class_embedding" and isinstance(module, nn.Embedding)):
            found.setdefault("class", path)
    return found


def _submodule(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"`condition_modules` says that {name!r} comes from {path!r}, but {type(model).__name__} has no "
            "such module."
        ) from error


def _output_size(module: nn.Module) -> int | None:
    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Embedding))]
    if not layers:
        return None
    last = layers[-1]
    return last.embedding_dim if isinstance(last, nn.Embedding) else last.out_features


def _prompt_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if default_sites(model) is None or config is None:
        return None
    for name in _PROMPT_SIZES:
        size = getattr(config, name, None)
        if size is not None:
            return size if isinstance(size, int) else size[0]
    return None


def _linear_sizes(linear: Any) -> tuple[int, int]:
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features
