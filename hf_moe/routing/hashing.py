"""Hash routing: the token id alone decides which experts a token is sent to.

Shapes: T tokens, V rows of the table, N experts (all, zero-computation ones included), K per token.
"""

import heapq
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .base import BaseRouter
from .output import RoutingContext
from .registry import register_router


__all__ = ["HashRouter", "balanced_hash_table", "random_hash_table"]

# Softmax and sigmoid make it exactly 0.
UNCHOSEN = -1e4
WEIGHTS = ("equal", "softmax", "sigmoid")


@register_router("hash")
class HashRouter(BaseRouter):
    """A fixed table from token ids to `K` experts; by default each has weight 1/K and nothing is learned.

    [Hash Layers](https://huggingface.co/papers/2106.04426), Sec. 3.1. The table is drawn at random, different in every
    layer; [`~HashRouter.set_table`] puts another in its place, e.g. one that balances the load of a corpus. It is a
    buffer, saved with the model. `temperature` and `norm_topk_prob` have no effect while all weights are equal.

    Note: ids from V on (an enlarged vocabulary) use row `id mod V`. Set `num_buckets` to the old vocabulary size then,
    because the table of a saved model has to have the size its config says.

    Args:
        seed (`int`, defaults to 0): Of the random table; the layer's index is added to it.
        num_buckets (`int`, *optional*): V, `config.vocab_size` by default.
        weight_from (`str`, defaults to `"equal"`): `"softmax"` or `"sigmoid"`: the table chooses, and the weights are
            a learned score of the hidden state, a softmax over the token's K experts or a sigmoid of each one's own
            (which learns with K = 1, too).

    Raises:
        ValueError: (in `forward`) there are no token ids: the model was given `inputs_embeds`, or does not hand its
            ids on.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(router_type="hash", num_experts_per_tok=1, router_config={"seed": 7})
    ```
    """

    needs_input_ids = True

    table: torch.Tensor  # (V, K)

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        seed: int = 0,
        num_buckets: int | None = None,
        weight_from: str = "equal",
        norm_topk_prob: bool | None = None,
        **kwargs,
    ):
        if norm_topk_prob is None:
            norm_topk_prob = weight_from != "sigmoid"
        super().__init__(config, layer_idx, norm_topk_prob=norm_topk_prob, **kwargs)
        self.seed = seed
        self.weight_from = weight_from
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size)) if self.learns else None
        rows = config.vocab_size if num_buckets is None else num_buckets
        self.register_buffer("table", torch.zeros(rows, self.top_k, dtype=torch.int64))
        self.reset_parameters()

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        buckets = options.get("num_buckets")
        if buckets is None and not getattr(config, "vocab_size", None):
            raise ValueError(
                "`router_type='hash'` needs token ids, and the config has no `vocab_size`. Set "
                "`router_config['num_buckets']`, or use another router."
            )
        if buckets is not None and buckets < 1:
            raise ValueError(f"`router_config['num_buckets']` must be at least 1, got {buckets}.")
        if options.get("seed", 0) < 0:
            raise ValueError(f"`router_config['seed']` must be at least 0, got {options['seed']}.")
        if options.get("weight_from", "equal") not in WEIGHTS:
            raise ValueError(
                f"`router_config['weight_from']` must be one of {list(WEIGHTS)}, got {options['weight_from']!r}."
            )

    @property
    def learns(self) -> bool:
        """Whether weights are learned scores."""
        return self.weight_from != "equal"

    def set_table(self, table: torch.Tensor) -> None:
        """Replaces the table, e.g. by a [`balanced_hash_table`].

        Args:
            table (`torch.Tensor` of shape `(V, K)`): Experts of every token id, different ones in a row.

        Raises:
            ValueError: the shape is another, an expert does not exist, or a row names one twice.
        """
        if table.shape != self.table.shape:
            raise ValueError(f"`table` must have the shape {tuple(self.table.shape)}, got {tuple(table.shape)}.")
        if table.is_floating_point() or table.min() < 0 or table.max() >= self.num_experts:
            raise ValueError(f"`table` must hold whole numbers from 0 to {self.num_experts - 1} (experts).")
        ordered = table.sort(dim=-1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("`table` names an expert twice in one row; a token's experts must be different ones.")
        self.table.copy_(table)

    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        ids = context.input_ids
        if ids is None:
            raise ValueError(
                "`router_type='hash'` routes by token id, but got no `input_ids`: the model was called with "
                "`inputs_embeds`, or does not hand token ids on to its MoE layers. Call it with `input_ids`, or use "
                "another router."
            )
        rows = ids.reshape(-1).to(self.table.device) % self.table.shape[0]
        chosen = self.table[rows]  # (T, K)
        logits = torch.full((hidden_states.shape[0], self.num_experts), UNCHOSEN, device=self.table.device)
        if self.weight is None:
            return logits.scatter(-1, chosen, 0.0)  # (T, N): 0 for the chosen
        learned = F.linear(hidden_states.float(), self.weight.float())  # (T, N)
        return logits.scatter(-1, chosen, learned.gather(-1, chosen))

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        if self.weight_from == "sigmoid":
            return torch.sigmoid(router_logits / self.temperature.float())
        return torch.softmax(router_logits / self.temperature.float() if self.learns else router_logits, dim=-1)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.table.device.type != "meta" and not getattr(self.table, "_is_hf_initialized", False):
            generator = torch.Generator().manual_seed(self.seed + self.layer_idx)
            init.copy_(self.table, random_hash_table(len(self.table), self.num_experts, self.top_k, generator))
        if self.weight is not None:
            init.normal_(self.weight, mean=0.0, std=self.initializer_range)


def random_hash_table(
    vocab_size: int, num_experts: int, top_k: int = 1, generator: torch.Generator | None = None
) -> torch.Tensor:
    """`K` different experts for every token id, uniformly at random.

    Args:
        vocab_size (`int`): V.
        num_experts (`int`): N.
        top_k (`int`, defaults to 1): K.
        generator (`torch.Generator`, *optional*): CPU generator.

    Returns:
        `torch.Tensor` of shape `(V, K)`, int64.
    """
    if top_k == 1:
        return torch.randint(num_experts, (vocab_size, 1), generator=generator, device="cpu")
    return torch.rand(vocab_size, num_experts, generator=generator, device="cpu").topk(top_k, dim=-1).indices


def balanced_hash_table(token_counts: torch.Tensor, num_experts: int, top_k: int = 1) -> torch.Tensor:
    """Experts for every token id such that all get about the same number of tokens of a corpus.

    [Hash Layers](https://huggingface.co/papers/2106.04426), Sec. 3.1, "balanced hash": ids in the order of their
    frequency, each to the expert with the fewest tokens so far. Ids that never occur are dealt out evenly.

    Args:
        token_counts (`torch.Tensor` of shape `(V,)`): How often each id occurs, as `torch.bincount` counts.
        num_experts (`int`): N.
        top_k (`int`, defaults to 1): K.

    Returns:
        `torch.Tensor` of shape `(V, K)`, int64.

    Raises:
        ValueError: `token_counts` is no vector of counts, or `top_k` exceeds `num_experts`.

    Example:

    ```python
    >>> balanced_hash_table(torch.tensor([5, 3, 2]), num_experts=2).flatten()
    tensor([0, 1, 1])
    ```
    """
    if token_counts.dim() != 1 or (token_counts < 0).any():
        raise ValueError(
            f"`token_counts` must be a vector of counts of at least 0, got shape {tuple(token_counts.shape)}."
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"`top_k` must be between 1 and `num_experts` ({num_experts}), got {top_k}.")
    table = torch.empty(token_counts.shape[0], top_k, dtype=torch.int64)
    # (load, ids held, expert): equal loads go to the expert with fewer ids, then to the lower index.
    heap = [(0.0, 0, expert) for expert in range(num_experts)]
    counts = token_counts.cpu()
    order = torch.argsort(counts, descending=True, stable=True).tolist()
    unseen = False
    for token in order:
        count = counts[token].item()
        if not unseen and count == 0:
            unseen = True
            heap = [(0.0, held, expert) for _, held, expert in heap]
            heapq.heapify(heap)
        chosen = [heapq.heappop(heap) for _ in range(top_k)]
        table[token] = torch.tensor([expert for _, _, expert in chosen])
        for load, held, expert in chosen:
            heapq.heappush(heap, (load + count, held + 1, expert))
    return table
