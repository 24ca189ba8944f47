"""Keeps some of the experts of a trained Mixture-of-Experts.

[Scalable and Efficient MoE Training for Multitask Multilingual Models](https://huggingface.co/papers/2109.10465)
(Z-code M3): a model trained with many experts is cut down for serving, and fine-tuned briefly.

Shapes: L MoE layers, N experts of a layer, N' kept, K per token, V vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .expert_axis import ExpertTensors, LayerTensors, expert_tensors, rebuild, set_expert_counts
from .expert_usage import ExpertUsage
from .sources import check_source


__all__ = ["POLICIES", "choose_experts", "prune_experts"]

POLICIES = ("load", "probability", "random")


def prune_experts(
    model: PreTrainedModel,
    keep: Mapping[int | str, Sequence[int] | torch.Tensor] | None = None,
    *,
    num_experts: int | None = None,
    usage: ExpertUsage | None = None,
    policy: str = "load",
    seed: int = 0,
) -> PreTrainedModel:
    """The model with some of its experts: E' = E[kept], W' = W[kept]. The model given is left as it is.

    Selection biases, residual maps between routers and hash tables are cut too; a token id whose expert goes is dealt
    to one that stays. `num_experts_per_tok` is lowered to N' where it exceeds it. Zero-computation experts stay.

    A softmax is over fewer experts afterwards: weights that are not renormalised grow by 1 / (1 - sum of the
    probabilities of those that went). Where weights are renormalised, removing experts that no token chose changes
    nothing. Fine-tune afterwards, balance loss on, without a capacity.

    Args:
        model (`PreTrainedModel`): Any Mixture-of-Experts that [`~hf_moe.moe_layers`] accepts, ours or transformers'.
        keep (`Mapping`, *optional*): MoE layer (its position among them, or its name) to the experts that stay, in
            their new order. Layers left out keep all.
        num_experts (`int`, *optional*): In place of `keep`: N' of every layer, chosen by `policy`.
        usage ([`ExpertUsage`], *optional*): What the policies `"load"` and `"probability"` go by; see
            [`expert_usage`]. Of one language's texts, for a model of that language.
        policy (`str`, defaults to `"load"`): `"load"` keeps the experts with most tokens, `"probability"` those with
            the highest mean probability, `"random"` any.
        seed (`int`, defaults to 0): Of `"random"`.

    Returns:
        `PreTrainedModel`: Of the same class; saves and loads like it.

    Raises:
        ValueError: nothing or too much is kept, a layer or expert does not exist, the family cannot have layers that
            differ, or a router limits its choice to groups that would become unequal.

    Example:

    ```python
    >>> usage = expert_usage(model, batches)
    >>> small = prune_experts(model, num_experts=4, usage=usage)
    ```
    """
    check_source(model)
    layers = expert_tensors(model)
    if (keep is None) == (num_experts is None):
        raise ValueError("Pass either `keep` (experts per layer) or `num_experts` (how many), not both or neither.")
    if keep is None:
        kept = choose_experts(layers, num_experts, usage, policy, seed)
    else:
        kept = _checked(layers, keep)
    _check_groups(layers, kept)
    config: Any = copy.deepcopy(model.config)
    before = [layer.num_experts - layer.num_idle for layer in layers]
    set_expert_counts(config, before, [len(chosen) for chosen in kept])
    state_dict = dict(model.state_dict())
    previous: torch.Tensor | None = None
    for layer, chosen in zip(layers, kept, strict=True):
        rows = torch.tensor([*chosen, *range(layer.num_experts - layer.num_idle, layer.num_experts)])
        for name, axis in layer.axes.items():
            index = rows if state_dict[name].shape[axis] == layer.num_experts else rows[: len(chosen)]
            state_dict[name] = state_dict[name].index_select(axis, index.to(state_dict[name].device))
        for name in layer.pairs:
            matrix = state_dict[name].index_select(0, rows.to(state_dict[name].device))
            state_dict[name] = matrix.index_select(1, (rows if previous is None else previous).to(matrix.device))
        for name in layer.tables:
            top_k = min(layer.view.num_experts_per_tok, min(len(chosen) for chosen in kept))
            state_dict[name] = _pruned_table(state_dict[name], chosen, top_k)
        previous = rows
    return rebuild(model, config, state_dict)


def choose_experts(
    layers: ExpertTensors, num_experts: Any, usage: ExpertUsage | None, policy: str, seed: int = 0
) -> list[list[int]]:
    """The experts of each layer that a policy keeps, in their old order.

    Args:
        layers (`list[LayerTensors]`): From [`expert_tensors`].
        num_experts (`int`): N'.
        usage, policy, seed: See [`prune_experts`].
    """
    if policy not in POLICIES:
        raise ValueError(f"`policy` must be one of {list(POLICIES)}, got {policy!r}.")
    if policy != "random" and usage is None:
        raise ValueError(
            f"`policy={policy!r}` goes by what the experts did: pass `usage=expert_usage(model, batches)`, or "
            '`policy="random"`.'
        )
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for position, layer in enumerate(layers):
        computing = layer.num_experts - layer.num_idle
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not 1 <= num_experts <= computing:
            raise ValueError(
                f"`num_experts` must be a whole number from 1 to {computing} (experts of {layer.view.name!r}), got "
                f"{num_experts!r}."
            )
        if usage is None or policy == "random":
            scores = torch.rand(computing, generator=generator)
        else:
            values = usage.counts if policy == "load" else usage.probabilities
            if len(values) != len(layers) or len(values[position]) < computing:
                sizes = [len(v) for v in values]
                raise ValueError(f"`usage` is of layers with {sizes} experts, not of this model; measure it again.")
            scores = values[position][:computing].double()
        kept.append(sorted(scores.argsort(descending=True, stable=True)[:num_experts].tolist()))
    return kept


def _checked(layers: ExpertTensors, keep: Mapping[int | str, Any]) -> list[list[int]]:
    by_name = {layer.view.name: position for position, layer in enumerate(layers)}
    kept = [list(range(layer.num_experts - layer.num_idle)) for layer in layers]
    for key, chosen in keep.items():
        position = by_name.get(key, key) if isinstance(key, str) else key
        if not isinstance(position, int) or not 0 <= position < len(layers):
            raise ValueError(
                f"`keep` names the MoE layer {key!r}; there are {list(by_name)} (0 to {len(layers) - 1})."
            )
        experts, indices = len(kept[position]), torch.as_tensor(chosen).tolist()
        wrong = [e for e in indices if not 0 <= e < experts]
        if not indices or wrong or len(set(indices)) != len(indices):
            raise ValueError(
                f"`keep[{key!r}]` must name at least one of the experts 0 to {experts - 1}, each once, got {indices}."
            )
        kept[position] = indices
    return kept


def _check_groups(layers: ExpertTensors, kept: list[list[int]]) -> None:
    for layer, chosen in zip(layers, kept, strict=True):
        groups = num_groups(layer)
        size = (layer.num_experts - layer.num_idle) // groups
        of_group = [expert // size for expert in chosen]
        if groups > 1 and (of_group != sorted(of_group) or len({of_group.count(g) for g in range(groups)}) > 1):
            raise ValueError(
                f"the router of {layer.view.name!r} chooses among {groups} groups of experts of equal size. Keep the "
                "same number of each group, in order."
            )


def num_groups(layer: LayerTensors) -> int:
    """Groups that a router limits its choice to; 1 where it does not."""
    router: Any = layer.view.router
    name = "num_expert_groups" if layer.view.rule is None else "num_group"
    return getattr(router, name, None) or 1


def _pruned_table(table: torch.Tensor, chosen: list[int], top_k: int) -> torch.Tensor:
    """A hash table `(V, K)` of experts that stay: a token keeps those of its own that do, and is dealt others."""
    new = {old: position for position, old in enumerate(chosen)}
    rows = []
    for token, row in enumerate(table.tolist()):
        own = [new[expert] for expert in row if expert in new]
        dealt = ((token + step) % len(chosen) for step in range(len(chosen)))
        rows.append([*own, *(expert for expert in dealt if expert not in own)][:top_k])
    return torch.tensor(rows, dtype=table.dtype, device=table.device)
