"""The dense-to-sparse gate of EvoMoE: every expert at first, fewer and fewer as a temperature falls, then top-K.

Shapes: T tokens, N experts (all, zero-computation ones included), K slots per token.
"""

from typing import Any

import torch
from transformers import initialization as init

from .output import RouterOutput, RoutingContext
from .registry import register_router
from .variable import VariableLinearRouter


__all__ = ["DenseToSparseRouter"]

WEIGHTS = ("softmax", "gumbel")
SELECTIONS = ("token", "batch")


@register_router("dense_to_sparse")
class DenseToSparseRouter(VariableLinearRouter):
    """In training a token gets every expert whose Gumbel-softmax share exceeds a threshold; at evaluation the top K.

    [EvoMoE](https://huggingface.co/papers/2112.14397), Sec. 3.2, as released. With l = h W^T and Gumbel noise z,
    q = softmax((l + z) / temperature), the active set is A = {i : q_i > threshold}, never empty. Weights are
    softmax(l)_i or q_i on A, not renormalised. Schedule the 0-dim buffers `temperature` (2.0 down to 0.3, say) and
    `hard` (1 from some step on: the K best of q, i.e. K draws without replacement) with `RouterScheduleCallback`.
    Evaluation is the top K = `num_experts_per_tok` of softmax(l), whatever the phase: 1 in the paper.

    Note: the paper's balance loss, N sum_i mean(g_i) mean(1[i in A]), uses the weights left after the threshold; here
    the loss all routers share takes softmax(l) and normalised frequencies, so that experts outside of A get a gradient
    too. Note: with more than 100 experts the threshold is multiplied by 100 / N, because equal shares are 1 / N.

    Args:
        threshold (`float`, defaults to 0.001): Share from which on an expert is active.
        weight_from (`str`, defaults to `"softmax"`): `"softmax"` (the released default) or `"gumbel"`, q itself.
        gumbel (`bool`, defaults to `True`): Add the noise.
        selection (`str`, defaults to `"token"`): `"batch"` gives all tokens of a batch the same number of experts,
            the mean of |A| rounded down (the variant of 2303.01610's code).
        temperature (`float`, defaults to 2.0): Until a schedule writes it.
        max_experts (`int`, *optional*): The most experts a token may get in training; N by default.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> schedules = {
    ...     "temperature": {"type": "exponential", "start": 2.0, "end": 0.3, "num_steps": 0.5},
    ...     "hard": {"type": "step", "at": 0.5},
    ... }
    >>> config = MoeLlamaConfig(
    ...     router_type="dense_to_sparse", num_experts_per_tok=1, router_config={"schedules": schedules}
    ... )
    ```
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        threshold: float = 0.001,
        weight_from: str = "softmax",
        gumbel: bool = True,
        selection: str = "token",
        temperature: float = 2.0,
        **kwargs,
    ):
        super().__init__(config, layer_idx, temperature=temperature, **kwargs)
        self.top_k = config.num_experts_per_tok
        self.threshold = threshold * min(1.0, 100 / self.num_experts)
        self.weight_from = weight_from
        self.gumbel = gumbel
        self.selection = selection
        self.register_buffer("hard", torch.zeros(()))

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        threshold = options.get("threshold", 0.001)
        if not 0 <= threshold < 1:
            raise ValueError(f"`router_config['threshold']` must be at least 0 and below 1, got {threshold}.")
        for name, allowed in (("weight_from", WEIGHTS), ("selection", SELECTIONS)):
            if options.get(name, allowed[0]) not in allowed:
                raise ValueError(f"`router_config[{name!r}]` must be one of {list(allowed)}, got {options[name]!r}.")
        most, top_k = options.get("max_experts"), config.num_experts_per_tok
        if most is not None and most < top_k:
            raise ValueError(
                f"`router_config['max_experts']` must be at least `num_experts_per_tok` ({top_k}), got {most}."
            )

    @property
    def num_slots(self) -> int:
        return self.max_experts if self.training else self.top_k

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(router_logits, dim=-1)

    def choice_scores(self, scores: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """q in training, `(T, N)`; the scores at evaluation."""
        if not self.training:
            return scores
        if self.gumbel:
            uniform = torch.rand_like(router_logits).clamp_min(torch.finfo(router_logits.dtype).tiny)
            router_logits = router_logits - torch.log(-torch.log(uniform))
        return torch.softmax(router_logits / self.temperature.float(), dim=-1)

    def keep(self, sorted_scores: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        rank = torch.arange(sorted_scores.shape[-1], device=sorted_scores.device)
        if not self.training:
            return (rank < self.top_k).expand(sorted_scores.shape)
        soft = (sorted_scores > self.threshold) | (rank == 0)  # the best expert always
        if self.selection == "batch":
            sizes = soft.sum(dim=-1)  # |A|
            real = torch.ones_like(sizes) if token_mask is None else token_mask.reshape(-1).long()
            mean = (sizes * real).sum() // real.sum().clamp(min=1)
            soft = (rank < mean.clamp(min=self.top_k)).expand(sorted_scores.shape)
        return torch.where(self.hard > 0.5, rank < self.top_k, soft)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext | None = None) -> RouterOutput:
        # A pipeline of its own: weights may come from the noisy q, and the batch variant has to leave out padding.
        context = context if context is not None else RoutingContext()
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits, soft = self.compute_logits(hidden_states, context), self.soft_permutation()
            router_logits = self.relabel(router_logits, soft)  # (T, N)
            scores = self.scores(router_logits)
            choice = self.choice_scores(scores, router_logits)  # (T, N)
            with torch.no_grad():
                values, index = torch.topk(choice, self.num_slots, dim=-1)
                index = index.masked_fill(~self.keep(values, context.token_mask), self.num_experts)  # (T, K)
            weights = self.weigh(choice if self.weight_from == "gumbel" else scores, index)
            router_logits, index, weights, penalty = self.mix(router_logits, index, weights, None, soft)
            index, weights = self.post_process(index, weights, context)
        return RouterOutput(router_logits, weights.to(hidden_states.dtype), index, None, penalty)

    @property
    def choice_differs_from_scores(self) -> bool:
        return self.training and self.gumbel and self.weight_from == "softmax"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "hard"):
            init.zeros_(self.hard)
