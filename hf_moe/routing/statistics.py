"""Routing statistics: who is used, how evenly, how decidedly. Detached, without padding, summed over processes.

Shapes: T tokens, L MoE layers, N experts (of the widest layer), K per token.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .balance import count_tokens, expert_counts, flat_mask, normalize_counts
from .layer_routing import LayerRouting


__all__ = ["RouterStats", "RoutingSummary"]


class RoutingSummary(NamedTuple):
    """What [`RouterStats`] found. Experts a narrower layer does not have are 0 in `(L, N)` fields.

    Args:
        counts (`torch.Tensor` of shape `(L, N)`): Assignments, int64.
        load (`torch.Tensor` of shape `(L, N)`): Share of assignments; rows sum to 1.
        mean_probability (`torch.Tensor` of shape `(L, N)`): P; rows sum to 1.
        entropy (`torch.Tensor` of shape `(L,)`): Mean over tokens of the entropy of p, in nats: log N is undecided.
        load_entropy (`torch.Tensor` of shape `(L,)`): Entropy of `load`, in nats: log N is perfectly even.
        max_violation (`torch.Tensor` of shape `(L,)`): max_i c_i / mean(c) - 1: 0 is perfectly even
            ([2408.15664](https://huggingface.co/papers/2408.15664), Eq. 4).
        dead_share (`torch.Tensor` of shape `(L,)`): Share of experts that received nothing.
        active_experts (`torch.Tensor` of shape `(L,)`): Mean number of active slots per token.
        num_tokens (`int`): Tokens seen; of the layer with the most, where layers see different ones.
    """

    counts: torch.Tensor
    load: torch.Tensor
    mean_probability: torch.Tensor
    entropy: torch.Tensor
    load_entropy: torch.Tensor
    max_violation: torch.Tensor
    dead_share: torch.Tensor
    active_experts: torch.Tensor
    num_tokens: int

    def scalars(self) -> dict[str, float]:
        """A fixed number of keys for a log, whatever the size of the model: means over layers, and the worst layer."""
        means = {
            key: getattr(self, key).mean().item()
            for key in ("entropy", "load_entropy", "max_violation", "dead_share", "active_experts")
        }
        return {**means, "max_violation_worst_layer": self.max_violation.max().item()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: lists instead of tensors."""
        return {key: v.tolist() if isinstance(v, torch.Tensor) else v for key, v in self._asdict().items()}


class RouterStats:
    """Accumulates routing statistics over batches; memory does not grow with the number of tokens.

    Example:

    ```python
    >>> stats = RouterStats()
    >>> for batch in batches:
    ...     outputs = model(**batch, output_router_logits=True)
    ...     layers = [LayerRouting(l, i) for l, i in zip(outputs.router_logits, outputs.router_indices)]
    ...     stats.update(layers, batch["attention_mask"])
    >>> stats.reduce().compute().max_violation
    tensor([0.1250, 0.5000])
    ```
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.num_experts: tuple[int, ...] = ()
        self._sums: _Sums | None = None

    @torch.no_grad()
    def update(
        self,
        layers: Iterable[LayerRouting],
        token_mask: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            layers (`Iterable[LayerRouting]`): One per MoE layer, in order. Kept nowhere.
            token_mask (`torch.Tensor` of shape `(T,)` or `(B, S)`, *optional*): `False` on padding. A list has one
                for each layer (or `None`): encoder and decoder route different tokens.

        Raises:
            ValueError: the layers are not those of the batches before, or the mask has another number of entries.
        """
        layers = tuple(layers)
        widths = tuple(layer.logits.shape[-1] for layer in layers)
        if not widths or (self.num_experts and widths != self.num_experts):
            raise ValueError(
                f"`layers` has the numbers of experts {list(widths)}, one per MoE layer, but needs "
                f"{list(self.num_experts) or 'at least one layer'}. Use one `RouterStats` per model, or `reset()` it."
            )
        if self._sums is None:
            self.num_experts = widths
            self._sums = _Sums.zeros(widths, layers[0].logits.device)
        sums = self._sums
        if token_mask is None or isinstance(token_mask, torch.Tensor):
            masks: Sequence[torch.Tensor | None] = [token_mask] * len(layers)
        else:
            masks = token_mask
        for row, (layer, width, mask) in enumerate(zip(layers, widths, masks, strict=True)):
            sums.counts[row, :width] += expert_counts(layer.index, width, mask).to(sums.counts.device)
            p = layer.distribution().to(sums.probability)  # (T, N)
            if mask is not None:
                p = p[flat_mask(mask, p.shape[0]).to(p.device)]
            sums.probability[row, :width] += p.sum(dim=0)
            sums.entropy[row] += torch.special.entr(p).sum()
            sums.num_tokens[row] += count_tokens(layer.index.shape[0], mask, sums.counts.device)

    def add(self, other: "RouterStats") -> None:
        """Adds what another one has seen, e.g. another process.

        Args:
            other ([`RouterStats`]): Of the same model.

        Raises:
            ValueError: it has other layers, or has seen nothing.
        """
        theirs = other._seen()
        if self._sums is None:
            self.num_experts = other.num_experts
            self._sums = _Sums.zeros(self.num_experts, theirs.counts.device)
        if other.num_experts != self.num_experts:
            raise ValueError(
                f"`other` has the numbers of experts {list(other.num_experts)}, one per MoE layer, but needs "
                f"{list(self.num_experts)}. Use one `RouterStats` per model."
            )
        for mine, value in zip(self._sums, theirs, strict=True):
            mine.add_(value.to(mine))

    def reduce(self, group: "dist.ProcessGroup | None" = None) -> "RouterStats":
        """The sum over processes, as a new object: two small collectives. Every process must have seen a batch.

        Args:
            group (`ProcessGroup`, *optional*): Processes with different data; all by default.

        Returns:
            [`RouterStats`]
        """
        sums = self._seen()
        whole = torch.cat([sums.counts.flatten(), sums.num_tokens])
        real = torch.cat([sums.probability.flatten(), sums.entropy])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(whole, group=group)
            dist.all_reduce(real, group=group)
        total = RouterStats()
        total.num_experts = self.num_experts
        shape, size = sums.counts.shape, sums.counts.numel()
        total._sums = _Sums(whole[:size].view(shape), real[:size].view(shape), real[size:], whole[size:])
        return total

    def compute(self) -> RoutingSummary:
        """The statistics of everything seen so far, on the CPU.

        Raises:
            ValueError: nothing was seen yet.
        """
        counts, probability, entropy, tokens = (value.cpu() for value in self._seen())
        width = torch.tensor(self.num_experts)  # (L,)
        exists = torch.arange(counts.shape[1]) < width.unsqueeze(-1)  # (L, N)
        load = normalize_counts(counts)
        per_token = 1 / tokens.clamp(min=1).double()  # (L,)
        mean = counts.sum(dim=-1).clamp(min=1) / width
        return RoutingSummary(
            counts=counts,
            load=load,
            mean_probability=(probability * per_token.unsqueeze(-1)).float(),
            entropy=(entropy * per_token).float(),
            load_entropy=torch.special.entr(load).sum(dim=-1),
            max_violation=counts.amax(dim=-1) / mean - 1,
            dead_share=((counts == 0) & exists).sum(dim=-1) / width,
            active_experts=(counts.sum(dim=-1) * per_token).float(),
            num_tokens=int(tokens.max()),
        )

    def _seen(self) -> "_Sums":
        if self._sums is None:
            raise ValueError("`RouterStats` has seen no batch yet; call `update` first.")
        return self._sums


class _Sums(NamedTuple):
    """Sums over tokens."""

    counts: torch.Tensor  # (L, N) int64
    probability: torch.Tensor  # (L, N)
    entropy: torch.Tensor  # (L,)
    num_tokens: torch.Tensor  # (L,)

    @classmethod
    def zeros(cls, widths: tuple[int, ...], device: torch.device) -> "_Sums":
        shape = (len(widths), max(widths))
        # Sums over millions of tokens need float64; MPS has none.
        real = torch.float32 if device.type == "mps" else torch.float64
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=real, device=device),
            torch.zeros(len(widths), dtype=real, device=device),
            torch.zeros(len(widths), dtype=torch.int64, device=device),
        )
