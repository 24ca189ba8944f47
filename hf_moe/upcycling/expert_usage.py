"""How much the experts of a model are used, by all texts or by texts of each language or domain.

Shapes: T tokens, L MoE layers, N experts of a layer, K per token.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_moe.modes import eval_mode
from hf_moe.routing.balance import expert_counts
from hf_moe.routing.steps import target_mask
from hf_moe.views import LayerRecord, record_routing


__all__ = ["ExpertUsage", "expert_usage"]


@dataclass(frozen=True)
class ExpertUsage:
    """Sums over tokens, one tensor of shape `(N,)` per MoE layer.

    Args:
        counts (`tuple[torch.Tensor, ...]`): Tokens sent to each expert, int64, as deployed: with selection biases,
            over all K slots.
        probabilities (`tuple[torch.Tensor, ...]`): Sum of the routers' distribution over tokens, float64.
        num_tokens (`tuple[int, ...]`): Tokens each layer routed, padding left out.
    """

    counts: tuple[torch.Tensor, ...]
    probabilities: tuple[torch.Tensor, ...]
    num_tokens: tuple[int, ...]

    def unused(self) -> dict[int, list[int]]:
        """MoE layer to the experts that no token was sent to; layers without any are left out."""
        idle = {i: torch.nonzero(counts == 0).flatten().tolist() for i, counts in enumerate(self.counts)}
        return {layer: experts for layer, experts in idle.items() if experts}

    def __add__(self, other: "ExpertUsage") -> "ExpertUsage":
        return ExpertUsage(
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            tuple(a + b for a, b in zip(self.probabilities, other.probabilities, strict=True)),
            tuple(a + b for a, b in zip(self.num_tokens, other.num_tokens, strict=True)),
        )


@torch.no_grad()
def expert_usage(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    per_group: str | Callable[[Mapping[str, Any]], str] | None = None,
) -> Any:
    """Runs a model over batches, in evaluation mode, and counts what its routers decide.

    Args:
        model (`nn.Module`): Any model that [`~hf_moe.moe_layers`] accepts.
        batches (`Iterable[Mapping]`): Model inputs; `attention_mask` marks padding. A `DataLoader` will do.
        per_group (`str` or callable, *optional*): Key of a batch that names its language or domain (taken out before
            the model runs), or a function of the batch that does.

    Returns:
        [`ExpertUsage`], or a `dict` from group to one where `per_group` is given.

    Raises:
        ValueError: there are no batches, or one lacks the key `per_group`.

    Example:

    ```python
    >>> usage = expert_usage(model, loader, per_group="language")
    >>> german = prune_experts(model, num_experts=8, usage=usage["de"])
    ```
    """
    totals: dict[str, ExpertUsage] = {}
    device = next(model.parameters()).device
    with eval_mode(model), record_routing(model, offload=True) as recorder:
        for batch in batches:
            inputs, group = dict(batch), ""
            if callable(per_group):
                group = per_group(batch)
            elif per_group is not None:
                if per_group not in inputs:
                    raise ValueError(f"`per_group={per_group!r}` is no key of a batch with {sorted(inputs)}.")
                group = inputs.pop(per_group)
                group = group if isinstance(group, str) else _only(group, per_group)
            model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
            seen = [_layer_usage(record, inputs) for record in recorder.layers]
            counts, probabilities, tokens = zip(*seen, strict=True)
            usage = ExpertUsage(counts, probabilities, tokens)
            totals[group] = totals[group] + usage if group in totals else usage
            recorder.clear()
    if not totals:
        raise ValueError("`batches` is empty; pass at least one batch of model inputs.")
    return totals if per_group is not None else totals[""]


def _only(groups: Any, name: str) -> str:
    names = {str(group) for group in groups}
    if len(names) != 1:
        raise ValueError(f"a batch mixes {name!r}: {sorted(names)}. Make batches of one group each.")
    return names.pop()


def _layer_usage(record: LayerRecord, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    view, tokens = record.view, 0
    counts = torch.zeros(view.num_experts, dtype=torch.int64)
    probability = torch.zeros(view.num_experts, dtype=torch.float64)
    for logits, index in zip(record.router_logits, record.top_k_index, strict=True):
        mask = _mask(view, inputs, index)
        counts += expert_counts(index, view.num_experts, mask)
        p = view.probabilities(logits.to(_device(view))).cpu().double()
        probability += (p if mask is None else p[mask]).sum(dim=0)
        tokens += index.shape[0] if mask is None else int(mask.sum())
    return counts, probability, tokens


def _device(view: Any) -> torch.device:
    return next(view.router.parameters(), torch.empty(0)).device


def _mask(view: Any, inputs: Mapping[str, Any], index: torch.Tensor) -> torch.Tensor | None:
    """Which of the routed tokens are real, `(T,)`."""
    if view.rule is None:  # our models route no padding at all
        return (index < view.num_experts).any(dim=-1)
    two_stacks = "labels" in inputs or "decoder_input_ids" in inputs
    is_target = two_stacks and "decoder" in view.name.split(".")
    mask = inputs.get("decoder_attention_mask" if is_target else "attention_mask")
    if mask is None and is_target and "labels" in inputs:
        mask = target_mask(inputs["labels"])
    if not isinstance(mask, torch.Tensor) or mask.numel() != index.shape[0]:
        return None
    return mask.reshape(-1).bool().cpu()
