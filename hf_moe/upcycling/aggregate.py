r"""Aggregation of Experts: two trained models become one with the experts of both.

[Scalable and Efficient MoE Training for Multitask Multilingual Models](https://huggingface.co/papers/2109.10465)
(Z-code M3). The paper's treatment of the other weights is not established; here, for checkpoints A and B of one shape,

    experts_l = concat(E_l^A, E_l^B),  W_l = concat(W_l^A, W_l^B),  all else: mean(A, B), A or B.

It means something where A and B share a history: one checkpoint at two steps, or two branches of one model trained on
different languages. Training goes on afterwards, with a new optimizer and a new warm-up.

Shapes: L MoE layers, N experts of a layer.
"""

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_moe.checkpoints import CheckpointReader, CheckpointWriter
from hf_moe.hub import write_shim

from .expert_axis import ExpertTensors, LayerTensors, expert_tensors, rebuild, set_expert_counts
from .prune import num_groups
from .sources import check_source
from .streaming import copy_rest, skeleton


__all__ = ["SHARED", "aggregate_checkpoints", "aggregate_experts"]

SHARED = ("mean", "a", "b")


def aggregate_experts(
    model_a: PreTrainedModel, model_b: PreTrainedModel, shared: str = "mean", rescale: bool = True
) -> PreTrainedModel:
    r"""One model with the 2N experts of both. The models given are left as they are.

    With A = B, a softmax over 2N experts gives each copy half of the probability. Where the chosen weights are
    renormalised, two experts per token are then both copies of the best one, each with weight 1/2. Where they are
    not, the branch would be half as large: `rescale` doubles the experts' last map, which for one expert per token
    preserves the function exactly.

    Note: the first N experts are A's. Pruned to them, with `shared="a"` and `rescale=False`, the result is A again.

    Args:
        model_a, model_b (`PreTrainedModel`): Of one class and shape, accepted by [`~hf_moe.moe_layers`].
        shared (`str`, defaults to `"mean"`): What becomes of all other weights: `"mean"`, `"a"` or `"b"`.
        rescale (`bool`, defaults to `True`): See above; it concerns softmax routers that do not renormalise only.

    Returns:
        `PreTrainedModel`: Of the same class; saves and loads like it. `num_experts_per_tok` stays.

    Raises:
        ValueError: the models differ in class or shape, their experts cannot be put side by side (a hash router, a
            choice limited to groups, zero-computation experts), or `shared` is unknown.

    Example:

    ```python
    >>> both = aggregate_experts(trained_on_code, trained_on_prose)
    >>> smaller = prune_experts(both, num_experts=8, usage=expert_usage(both, batches))
    ```
    """
    for argument, model in (("model_a", model_a), ("model_b", model_b)):
        check_source(model, argument)
    if type(model_a) is not type(model_b):
        raise ValueError(
            f"`model_a` is a {type(model_a).__name__} and `model_b` a {type(model_b).__name__}; they must be alike."
        )
    a, b = model_a.state_dict(), model_b.state_dict()
    _check_alike({k: v.shape for k, v in a.items()}, {k: v.shape for k, v in b.items()})
    layers = expert_tensors(model_a)
    config = _config(model_a.config, layers, shared)
    owner, factors = _owners(layers), _factors(layers, rescale)
    state_dict = {}
    for name, tensor in a.items():
        for key, value in _aggregated(name, tensor, b[name].to(tensor.device), owner.get(name), factors, shared):
            state_dict[key] = value
    return rebuild(model_a, config, state_dict)


def aggregate_checkpoints(
    folder_a: str | os.PathLike,
    folder_b: str | os.PathLike,
    destination: str | os.PathLike,
    shared: str = "mean",
    rescale: bool = True,
    max_shard_size: int = 1_000_000_000,
) -> None:
    """[`aggregate_experts`] for checkpoints: reads two folders tensor by tensor and writes a third, so that neither
    model has to fit in memory. The destination appears when it is complete.

    Args:
        folder_a, folder_b (`str`): Folders with weights, experts stacked or one by one.
        destination (`str`): Folder to write; must not exist, or be empty. Tokenizer files are A's.
        shared, rescale: See [`aggregate_experts`].
        max_shard_size (`int`, defaults to 1e9): Bytes after which a weight file is closed.

    Raises:
        ValueError: see [`aggregate_experts`]; a folder that cannot be read; a destination that is not empty.

    Example:

    ```python
    >>> aggregate_checkpoints("moe-code", "moe-prose", "moe-both")
    ```
    """
    a, b = CheckpointReader(folder_a), CheckpointReader(folder_b)
    model, other = skeleton(a.folder), skeleton(b.folder)
    if type(model) is not type(other):
        raise ValueError(
            f"`folder_a` holds a {type(model).__name__} and `folder_b` a {type(other).__name__}; they must be alike."
        )
    shapes = {name: a.shape(name) for name in a.keys()}
    _check_alike(shapes, {name: b.shape(name) for name in b.keys()})
    layers = expert_tensors(model, shapes)
    config = _config(model.config, layers, shared)
    config.dtype, config.architectures = model.config.dtype, [type(model).__name__]
    owner, factors = _owners(layers), _factors(layers, rescale)
    with CheckpointWriter(destination, max_shard_size) as shards:
        for name in sorted(a.keys()):
            for key, value in _aggregated(name, a[name], b[name], owner.get(name), factors, shared):
                shards.add(key, value.clone())
        if hasattr(config, "experts_per_layer"):  # a type of ours
            write_shim(shards.partial, config)
        config.save_pretrained(shards.partial)
        copy_rest(a.folder, shards.partial)


def _config(source: Any, layers: ExpertTensors, shared: str) -> Any:
    if shared not in SHARED:
        raise ValueError(f"`shared` must be one of {list(SHARED)}, got {shared!r}.")
    for layer in layers:
        why = None
        if layer.tables:
            why = "a hash router sends each token id to experts by name, and cannot choose between two models"
        elif num_groups(layer) > 1:
            why = "its router limits the choice to groups of experts, whose number would change"
        elif layer.num_idle:
            why = "its zero-computation experts exist in both and would be there twice"
        if why:
            raise ValueError(f"the experts of {layer.view.name!r} cannot be put beside those of another model: {why}.")
    config = copy.deepcopy(source)
    before = [layer.num_experts for layer in layers]
    set_expert_counts(config, before, [2 * count for count in before])
    return config


def _check_alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    wrong = sorted(a.keys() ^ b.keys()) or [name for name in a if tuple(a[name]) != tuple(b[name])]
    if wrong:
        raise ValueError(
            f"the two models differ in {wrong[0]!r} ({tuple(a.get(wrong[0], ())) or 'absent'} and "
            f"{tuple(b.get(wrong[0], ())) or 'absent'}); only models of one shape can be aggregated."
        )


def _owners(layers: ExpertTensors) -> dict[str, LayerTensors]:
    return {name: layer for layer in layers for name in layer.names()}


def _factors(layers: ExpertTensors, rescale: bool) -> dict[int, float]:
    """Factor on the output of the experts of each layer: 2 where a softmax over 2N halves what was."""
    factors = {}
    for layer in layers:
        halved = layer.view.normalisation == "none" and _is_softmax(layer)
        factors[layer.view.index] = 2.0 if rescale and halved else 1.0
        if factors[layer.view.index] != 1 and not any(layer.is_down(name) for name in layer.names()):
            raise ValueError(
                f"`rescale=True`: the last map of the experts of {layer.view.name!r} was not found by its name. Pass "
                "`rescale=False`."
            )
    return factors


def _is_softmax(layer: LayerTensors) -> bool:
    """Whether the scores of a layer's router sum to 1, so that more experts leave less for each."""
    if layer.view.rule is not None:
        return layer.view.score_function == "softmax"
    return layer.view.router.router_type != "sigmoid_topk"


def _aggregated(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    layer: LayerTensors | None,
    factors: dict[int, float],
    shared: str,
) -> list[tuple[str, torch.Tensor]]:
    """What a tensor becomes: entries of the result by name."""
    if layer is None:
        if shared == "mean" and a.is_floating_point():
            return [(name, ((a.float() + b.float()) / 2).to(a.dtype))]
        return [(name, b if shared == "b" else a)]
    factor = factors[layer.view.index]
    if factor != 1 and layer.is_down(name):
        a, b = a * factor, b * factor  # a power of two: exact in every dtype
    if name in layer.single:
        expert, pattern = layer.single[name]
        return [(name, a), (pattern.format(expert + layer.num_experts), b)]
    if name in layer.pairs:
        return [(name, torch.block_diag(a, b))]
    return [(name, torch.cat([a, b], dim=layer.axes[name]))]
