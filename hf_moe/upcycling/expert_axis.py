"""Which tensors of a checkpoint have one entry per expert, and models rebuilt with another number of experts.

Works on names and shapes, so that the same plan serves a state dict and a checkpoint too large to load.

Shapes: L MoE layers, N experts of a layer, Z of them without a feed-forward, D hidden.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_moe.view_layer import MoeLayerView
from hf_moe.views import moe_layers

from .sources import check_source


__all__ = ["ExpertTensors", "LayerTensors", "expert_tensors", "rebuild", "set_expert_counts"]

# What families call the number of experts, and of experts per token.
COUNT_FIELDS = (
    "num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts",
)  # fmt: skip
TOP_K_FIELDS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "moe_top_k",
    "top_k_experts",
)  # fmt: skip
# Routers whose experts are leaves of a structure that no row can be taken out of.
STRUCTURED_ROUTERS = ("comet", "dselect_k")
ONE_EXPERT = re.compile(r"^(\d+)\.(.+)$")
DOWN = re.compile(r"(?:^|\.)(?:down_proj|down_proj_bias|w2|output_linear|wo|fc2|linear_2)(?:\.|$)")


@dataclass
class LayerTensors:
    """The tensors of one MoE layer that have an axis of experts.

    Args:
        view ([`MoeLayerView`]): The layer (possibly on the meta device).
        axes (`dict[str, int]`): Name of a tensor to its axis of experts.
        pairs (`list[str]`): Maps from the logits of the MoE layer before to this one's, with both axes.
        tables (`list[str]`): Tables of expert indices.
        single (`dict[str, tuple[int, str]]`): Name of a tensor of one expert to expert and name, `{}` for the number.
    """

    view: MoeLayerView
    axes: dict[str, int] = field(default_factory=dict)
    pairs: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    single: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """N, with those that compute nothing."""
        return self.view.num_experts

    @property
    def num_idle(self) -> int:
        """Z."""
        return self.view.num_experts - self.view.num_computing_experts

    def names(self) -> set[str]:
        """Of all of them."""
        return {*self.axes, *self.pairs, *self.tables, *self.single}

    @staticmethod
    def is_down(name: str) -> bool:
        """Whether a tensor of the experts is their last map, where a factor on their output belongs."""
        tail = name.partition(".experts.")[2]
        return bool(tail) and DOWN.search(tail) is not None


ExpertTensors = list[LayerTensors]


def expert_tensors(model: PreTrainedModel, shapes: Mapping[str, Iterable[int]] | None = None) -> ExpertTensors:
    """Finds them.

    Args:
        model (`PreTrainedModel`): A Mixture-of-Experts accepted by [`~hf_moe.moe_layers`]; the meta device will do.
        shapes (`Mapping`, *optional*): Names and shapes in a checkpoint; by default those of the model's state dict.
            Checkpoints may hold experts one by one and call blocks otherwise.

    Returns:
        `list[LayerTensors]`: One per MoE layer.

    Raises:
        ValueError: the experts are not stacked (and not one by one in a checkpoint), or a router has a tensor that
            is not understood; names family and tensor.
    """
    views = moe_layers(model)
    if shapes is None:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    prefixes = _block_names(views, shapes)
    modules = {id(module): name for name, module in model.named_modules()}
    layers = []
    for view, prefix in zip(views, prefixes, strict=True):
        router_path = modules[id(view.router)].removeprefix(f"{view.name}.")
        layers.append(_layer(view, prefix, f"{prefix}.{router_path}", shapes))
    return layers


def _block_names(views: list[MoeLayerView], shapes: Mapping[str, Any]) -> list[str]:
    if all(any(name.startswith(f"{view.name}.experts.") for name in shapes) for view in views):
        return [view.name for view in views]
    found = {name.partition(".experts.")[0] for name in shapes if ".experts." in name}
    found = sorted(found, key=_numbers)
    if len(found) != len(views):
        raise ValueError(
            f"the checkpoint has experts in {len(found)} blocks ({', '.join(found[:2])}, ...), but its model has "
            f"{len(views)} MoE layers. Load the model and use the function that takes models."
        )
    return found


def _numbers(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _layer(view: MoeLayerView, prefix: str, router: str, shapes: Mapping[str, Any]) -> LayerTensors:
    layer, kind = LayerTensors(view), type(view.router).__name__
    own_router = view.rule is None and view.router.router_type
    if own_router in STRUCTURED_ROUTERS:
        raise ValueError(
            f"the experts of router {own_router!r} are leaves of a tree, none of which can be taken out. Use a "
            "model with another router, such as 'softmax_topk'."
        )
    computing = view.num_computing_experts
    experts = {name: tuple(shape) for name, shape in shapes.items() if name.startswith(f"{prefix}.experts.")}
    for name, shape in experts.items():
        one = ONE_EXPERT.match(name.removeprefix(f"{prefix}.experts."))
        if one:
            layer.single[name] = (int(one[1]), f"{prefix}.experts.{{}}.{one[2]}")
        elif shape and shape[0] == computing:
            layer.axes[name] = 0
        else:
            experts = {}
            break
    if not experts or (layer.single and layer.axes):
        raise ValueError(
            f"the experts of {prefix!r} ({type(view.experts).__name__}) are not stacked: no tensor has {computing} "
            "experts as its first axis. Tools on experts need that layout."
        )
    beside = [n for n in shapes if n.startswith(f"{prefix}.") and "." not in n.removeprefix(f"{prefix}.")]
    for name in [n for n in shapes if n.startswith(f"{router}.")] + beside:
        shape = tuple(shapes[name])
        axes = [axis for axis, size in enumerate(shape) if size == view.num_experts]
        if own_router == "hash" and name.endswith(".table"):
            layer.tables.append(name)
        elif name.endswith(".residual_weight") and view.rule is None:
            layer.pairs.append(name)
        elif len(axes) == 1 or (len(axes) == 2 and name.endswith("weight")):
            layer.axes[name] = axes[0]  # of a square matrix the rows: a router maps hidden states to experts
        elif axes:
            raise ValueError(f"{name!r} of {kind} has several axes of {view.num_experts}: which counts the experts?")
    if not any(name.startswith(f"{router}.") for name in layer.names()):
        raise ValueError(
            f"no tensor of the router {router!r} ({kind}) has one entry for each of its {view.num_experts} experts."
        )
    return layer


def set_expert_counts(config: Any, before: list[int], after: list[int]) -> None:
    """Writes the numbers of computing experts into a model config, and lowers the experts per token where they exceed
    them.

    Args:
        config: Of the whole model; changed.
        before, after (`list[int]`): Per MoE layer.

    Raises:
        ValueError: the layers would differ and the family cannot say so, or no field holds the number.
    """
    config = config.get_text_config()
    if len(set(after)) > 1 and not hasattr(config, "experts_per_layer"):
        raise ValueError(
            f"the MoE layers would have {after} experts, but `{config.model_type}` has one number for all its layers. "
            "Keep the same number in every layer, or use a model type of hf_moe."
        )
    value = after[0] if len(set(after)) == 1 else list(after)
    names = [
        name
        for name in dict.fromkeys(config.attribute_map.get(name, name) for name in COUNT_FIELDS)
        if getattr(config, name, None) in (before[0], list(before))
    ]
    if not names:
        raise ValueError(
            f"no field of the `{config.model_type}` config holds its number of experts ({before[0]}); known are "
            f"{list(COUNT_FIELDS)}."
        )
    for name in names:
        setattr(config, name, value)
    for name in dict.fromkeys(config.attribute_map.get(name, name) for name in TOP_K_FIELDS):
        top_k = getattr(config, name, None)
        if isinstance(top_k, int) and top_k > min(after):
            setattr(config, name, min(after))


def rebuild(model: PreTrainedModel, config: Any, state_dict: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the same class from another config and weights.

    Args:
        model (`PreTrainedModel`): Gives class, dtype, device and mode; only read.
        config: Config of the result.
        state_dict (`dict[str, torch.Tensor]`): Its weights, under the names of the model's own state dict.

    Raises:
        ValueError: the weights do not fit; names the first that does not.
    """
    check_source(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    entries = {name: tensor.detach().clone() for name, tensor in state_dict.items() if name not in tied}
    loaded: Any = type(model).from_pretrained(
        None,
        config=config,
        state_dict=entries,
        dtype=model.dtype,
        experts_implementation=model.config._experts_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, with the tensor's name
    )
    result, info = loaded
    problems = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
    problems = sorted(key for key in problems if "load_balancer." not in key)
    if problems:
        raise ValueError(
            f"{type(model).__name__} cannot have another number of experts: {', '.join(problems[:3])} do not fit."
        )
    result.config.name_or_path = ""
    if getattr(model, "generation_config", None) is not None:
        result.generation_config = copy.deepcopy(model.generation_config)
    return result.to(model.device).train(model.training)
