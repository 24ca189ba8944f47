"""The balance losses as pure functions: how often experts are used, how probable they are, and the product of both.

Shapes: T tokens, N experts (all, zero-computation ones included), K per token.
"""

import torch


__all__ = [
    "balance_value",
    "count_tokens",
    "expert_counts",
    "expert_frequency",
    "load_balance_loss",
    "mean_probability",
    "normalize_counts",
    "router_z_loss",
]


def expert_counts(index: torch.Tensor, num_experts: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """How many assignments each expert received. Empty slots and padding tokens are not counted.

    Args:
        index (`torch.Tensor` of shape `(T, K)`): Chosen experts; `num_experts` marks an empty slot.
        num_experts (`int`): N.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): `False` on padding.

    Returns:
        `torch.Tensor` of shape `(N,)`, int64: exact at any size, unlike `histc` on floats.

    Example:

    ```python
    >>> expert_counts(torch.tensor([[0, 2], [2, 3]]), num_experts=3)  # 3 is the empty slot
    tensor([1, 0, 2])
    ```
    """
    flat = index.reshape(-1).long()
    if token_mask is None:
        ones = torch.ones_like(flat)
    else:
        ones = flat_mask(token_mask, index.shape[0]).long().unsqueeze(-1).expand(index.shape).reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, ones)[:num_experts]  # the last column held the empty slots


def normalize_counts(counts: torch.Tensor) -> torch.Tensor:
    """f_i = c_i / sum(c) along the last dimension; all zero where nothing was counted."""
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def expert_frequency(index: torch.Tensor, num_experts: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """f_i, the share of assignments that expert i received, sum 1.

    f_i = 1/(K T) sum_t 1[i in S_t]; with empty slots K is the mean number of active slots.

    Args:
        index (`torch.Tensor` of shape `(T, K)`): Chosen experts; `num_experts` marks an empty slot.
        num_experts (`int`): N.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): `False` on padding.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, without gradient.
    """
    return normalize_counts(expert_counts(index, num_experts, token_mask))


def mean_probability(probabilities: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """P_i = 1/T sum_t p_ti over the tokens that are not padding.

    Args:
        probabilities (`torch.Tensor` of shape `(T, N)`): Rows sum to 1.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): `False` on padding.

    Returns:
        `torch.Tensor` of shape `(N,)`; 0 where every token is padding.
    """
    return masked_mean(probabilities, token_mask)


def balance_value(
    mean_probability: torch.Tensor, frequency: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """N sum_i eta_i f_i P_i from the two means. The frequency is a constant to the gradient.

    Args:
        mean_probability (`torch.Tensor` of shape `(N,)`): P.
        frequency (`torch.Tensor` of shape `(N,)`): f, sum 1.
        weights (`torch.Tensor` of shape `(N,)`, *optional*): eta; all 1 by default.

    Returns:
        `torch.Tensor`, 0-dim: 1 when balanced, N when one expert takes everything with probability 1.
    """
    terms = frequency.detach().to(mean_probability) * mean_probability
    if weights is not None:
        terms = terms * weights.to(terms)
    return mean_probability.shape[-1] * terms.sum()


def load_balance_loss(
    probabilities: torch.Tensor,
    frequency: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load-balance loss of one layer, L = N sum_i eta_i f_i P_i.

    [Demons in the Detail](https://huggingface.co/papers/2501.11873), Eqs. 2-3, with f over whatever batch the caller
    counted: because f carries no gradient, the loss of a large batch is the sum of its parts' losses, each with its
    own P weighted by its share of the tokens and all with the f of the whole.

    Note: f is normalised by K (sum 1), so that the balanced value is 1 for every K; transformers' Mixtral helper
    gives K times this. The heterogeneous loss of [MoE++](https://huggingface.co/papers/2410.07348), Eq. 7, which
    has sum f = K and no factor N, is K/N times this one with its eta as `weights`.

    Args:
        probabilities (`torch.Tensor` of shape `(T, N)`): Rows sum to 1, e.g. `router.probabilities(logits)`.
        frequency (`torch.Tensor` of shape `(N,)`): f, see [`expert_frequency`].
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): `False` on padding.
        weights (`torch.Tensor` of shape `(N,)`, *optional*): eta, e.g. `router.balance_weights`.

    Returns:
        `torch.Tensor`, 0-dim.

    Example:

    ```python
    >>> probabilities = torch.full((6, 3), 1 / 3)
    >>> load_balance_loss(probabilities, expert_frequency(torch.arange(6).view(6, 1) % 3, num_experts=3))
    tensor(1.)
    ```
    """
    return balance_value(mean_probability(probabilities, token_mask), frequency, weights)


def router_z_loss(logits: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of (log sum_i exp l_i)^2, which keeps logits small ([ST-MoE](https://huggingface.co/papers/2202.08906),
    Eq. 5).

    Args:
        logits (`torch.Tensor` of shape `(T, N)`): Router logits.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): `False` on padding.

    Returns:
        `torch.Tensor`, 0-dim.
    """
    return masked_mean(logits.float().logsumexp(dim=-1).square(), token_mask)


def count_tokens(num_rows: int, token_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Tokens that are not padding, a 0-dim int64 tensor."""
    if token_mask is None:
        return torch.full((), num_rows, dtype=torch.int64, device=device)
    return flat_mask(token_mask, num_rows).sum().to(device)


def flat_mask(token_mask: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`token_mask` as a boolean vector.

    Raises:
        ValueError: it has another number of entries than there are routed tokens.
    """
    if token_mask.numel() != num_rows:
        raise ValueError(
            f"`token_mask` has {token_mask.numel()} entries (shape {tuple(token_mask.shape)}) but {num_rows} tokens "
            "were routed. Pass one entry per token of this call, without cached positions."
        )
    return token_mask.reshape(-1).bool()


def masked_mean(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over dim 0 of `values` (T, ...), padding left out."""
    if token_mask is None:
        return values.mean(dim=0)
    mask = flat_mask(token_mask, values.shape[0]).to(values.device)
    kept = values.masked_fill(~mask.view(-1, *[1] * (values.dim() - 1)), 0.0)  # also drops nan of padding rows
    return kept.sum(dim=0) / mask.sum().clamp(min=1)
