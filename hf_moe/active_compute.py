"""What a token costs in a Mixture-of-Experts model, by the number of experts it really uses.

Shapes: T tokens, L MoE layers, N experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .modes import eval_mode
from .views import moe_layers, record_routing, unwrap_model


__all__ = ["ActiveCompute", "active_compute", "active_flops"]


@dataclass(frozen=True)
class ActiveCompute:
    """Weights of the matrix products a token goes through.

    Counted are matrices: embeddings that are looked up, norms and biases multiply nothing. The products of queries,
    keys and values with each other depend on the length of the text and are left out, as in the Trainer's
    `total_flos`.

    Args:
        always (`int`): Weights of the products every token goes through: attention, dense layers, routers, head.
        per_expert (`tuple[int, ...]`): Those of one routed expert, by MoE layer.
        num_experts (`tuple[int, ...]`): Experts with a feed-forward, by MoE layer.

    Example:

    ```python
    >>> compute = active_compute(model)
    >>> compute.flops(active_experts=1.7, num_tokens=1000) / compute.flops(compute.num_experts, num_tokens=1000)
    0.31
    ```
    """

    always: int
    per_expert: tuple[int, ...]
    num_experts: tuple[int, ...]

    def weights(self, active_experts: float | Sequence[float]) -> float:
        """Weights per token.

        Args:
            active_experts (`float` or `Sequence[float]`): Experts per token, a mean; one number for each MoE layer, or
                one for all.
        """
        layers = len(self.per_expert)
        active = [active_experts] * layers if isinstance(active_experts, int | float) else list(active_experts)
        if len(active) != layers:
            raise ValueError(f"`active_experts` must be a number or one per MoE layer ({layers}), got {len(active)}.")
        return self.always + sum(k * size for k, size in zip(active, self.per_expert, strict=True))

    def flops(self, active_experts: float | Sequence[float], num_tokens: float = 1, training: bool = False) -> float:
        """Floating-point operations: 2 per weight and token forward, 6 with the backward pass.

        Args:
            active_experts (`float` or `Sequence[float]`): As in [`weights`].
            num_tokens (`float`, defaults to 1): T.
            training (`bool`, defaults to `False`): Forward and backward.
        """
        return (6 if training else 2) * num_tokens * self.weights(active_experts)


def active_compute(model: nn.Module) -> ActiveCompute:
    """Reads the sizes of a model.

    Args:
        model (`nn.Module`): Accepted by [`~hf_moe.moe_layers`].

    Returns:
        [`ActiveCompute`]

    Raises:
        ValueError: see [`~hf_moe.moe_layers`].

    Example:

    ```python
    >>> active_compute(model).per_expert
    (589824, 589824)
    ```
    """
    inner = unwrap_model(model)
    views = moe_layers(inner)
    routed = {id(p) for view in views for p in view.experts.parameters()}
    looked_up = {id(p) for m in inner.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is not None:  # may be the same tensor as the embedding, but multiplies
        looked_up -= {id(p) for p in head.parameters(recurse=False)}
    always = sum(p.numel() for p in inner.parameters() if p.dim() >= 2 and id(p) not in routed | looked_up)
    per_expert = tuple(_size_of_one(view) for view in views)
    return ActiveCompute(always, per_expert, tuple(view.num_computing_experts for view in views))


def active_flops(model: nn.Module, batch: Mapping[str, torch.Tensor], **kwargs: Any) -> dict[str, float]:
    """Runs a batch in evaluation mode and says what it cost, experts counted that tokens were really sent to.

    Args:
        model (`nn.Module`): Accepted by [`~hf_moe.moe_layers`].
        batch (`Mapping[str, torch.Tensor]`): Inputs; padding is what `attention_mask` `(B, S)` says.
        **kwargs: Further keyword arguments of the forward.

    Returns:
        `dict`: `active_experts`, mean over tokens and layers; `flops` of this forward; `flops_per_token`; and
        `flops_share`, of what all experts would cost. See [`ActiveCompute`] for what is counted.

    Example:

    ```python
    >>> active_flops(model, {"input_ids": ids})["flops_share"]
    0.42
    ```
    """
    compute = active_compute(model)
    with torch.no_grad(), eval_mode(model), record_routing(model) as recorder:
        model(**batch, **kwargs)
    mask = batch.get("attention_mask")
    active, num_tokens = [], 0
    for layer, computing in zip(recorder.layers, compute.num_experts, strict=True):
        index = torch.cat(layer.top_k_index)
        used = (index < computing).sum(dim=-1)
        if mask is not None and mask.numel() == index.shape[0]:
            used = used[mask.reshape(-1).bool().to(used.device)]
        num_tokens = max(num_tokens, used.numel())
        active.append(used.double().mean().item() if used.numel() else 0.0)
    flops = compute.flops(active, num_tokens)
    return {
        "active_experts": sum(active) / len(active),
        "flops": flops,
        "flops_per_token": flops / max(num_tokens, 1),
        "flops_share": flops / max(compute.flops(compute.num_experts, num_tokens), 1.0),
    }


def _size_of_one(view: Any) -> int:
    stacked = [p for p in view.experts.parameters() if p.dim() >= 3]
    if stacked:
        return sum(p.numel() // p.shape[0] for p in stacked)
    return sum(p.numel() for p in view.experts.parameters() if p.dim() >= 2) // max(view.num_computing_experts, 1)
