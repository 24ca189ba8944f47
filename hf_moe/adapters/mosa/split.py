"""A linear map whose weight is split into groups, of which each training step moves one."""

import operator
from typing import Any, NamedTuple

import torch
from torch import nn


__all__ = ["SplitLinear", "partition"]


def partition(shape: torch.Size | tuple[int, ...], num_experts: int, seed: int) -> torch.Tensor:
    r"""Deals the entries of a tensor out to experts, at random and as evenly as possible.

    A number is drawn uniformly for each of the n entries; expert i gets those with the ranks
    floor(i n / M) + 1 ... floor((i + 1) n / M).

    Args:
        shape (`tuple[int, ...]`): Of the tensor.
        num_experts (`int`): M, at most 256 and at most n.
        seed (`int`): Of the draw.

    Returns:
        `torch.Tensor` of that shape, uint8: the expert each entry belongs to.

    Raises:
        ValueError: There are more experts than entries, or than a byte can number.

    Example:
        ```python
        partition((5, 7), 4, seed=0).flatten().bincount()  # tensor([8, 9, 9, 9])
        ```
    """
    count = torch.Size(shape).numel()
    if not 1 <= num_experts <= min(count, 256):
        raise ValueError(
            f"`num_experts` must be between 1 and {min(count, 256)} to split a tensor of shape {tuple(shape)}, got "
            f"{num_experts}."
        )
    # on the CPU whatever the default device: the draw must not depend on where the model is
    draw = torch.rand(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    order = draw.argsort(stable=True)
    assign = torch.empty(count, dtype=torch.uint8, device="cpu")
    for expert in range(num_experts):
        assign[order[expert * count // num_experts : (expert + 1) * count // num_experts]] = expert
    return assign.reshape(shape)


class _Merged(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    sources: tuple[torch.Tensor, ...]  # what it was made from, and the state they were in
    versions: tuple[tuple[int, int], ...]


class SplitLinear(nn.Module):
    r"""`x W^T + b` with M experts in place of (W, b).

    Expert i is V where `assign` is i, and the starting weight W0 elsewhere. In training each call draws one expert
    for the whole batch; the gradient then reaches that expert's entries of V and its bias alone. Otherwise the mean of
    the experts is used, W0 + merge_scale (V - W0) / M, which costs what one plain weight costs.

    This is the one-tensor form of M copies whose gradients are masked. Shapes: O outputs, I inputs.

    Note: under AdamW a reference with M copies makes no step for an expert that was not drawn; here its entries have
    gradient zero, so that momentum still moves them.

    Args:
        linear (`nn.Linear`, or `torch.Tensor` of shape `(..., O, I)`): What V starts as, and every expert's bias.
        num_experts (`int`): M.
        seed (`int`): Of the partition.
        merge_scale (`float`, defaults to 1.0): Factor of the merged update; M gives the union of the experts.
        from_zero (`bool`, defaults to `True`): W0 is zero and not stored; otherwise it is the weight of `linear`.
        trained (`bool`, defaults to `False`): V is away from W0, as if it had been trained (for tests).

    Example:
        ```python
        SplitLinear(nn.Linear(64, 768), num_experts=4, seed=0).eval()(hidden)  # the mean of the four experts
        ```
    """

    assign: torch.Tensor
    initial: torch.Tensor | None

    def __init__(
        self,
        linear: nn.Linear | torch.Tensor,
        num_experts: int,
        seed: int,
        merge_scale: float = 1.0,
        from_zero: bool = True,
        trained: bool = False,
    ):
        super().__init__()
        weight: torch.Tensor = linear if isinstance(linear, torch.Tensor) else linear.weight
        bias = None if isinstance(linear, torch.Tensor) else linear.bias
        self.num_experts = num_experts
        self.merge_scale = merge_scale
        self.weight = nn.Parameter(torch.empty_like(weight))  # V
        self.bias = None if bias is None else nn.Parameter(bias.new_empty(num_experts, *bias.shape))
        self.register_buffer("assign", partition(weight.shape, num_experts, seed))
        self.register_buffer("initial", None if from_zero else weight.detach().clone())
        self._cache: _Merged | None = None
        with torch.no_grad():
            self.weight.copy_(weight)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias.expand_as(self.bias))
            if trained:
                for parameter in self.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def draw(self) -> torch.Tensor:
        """Draws an expert uniformly.

        Returns:
            `torch.Tensor` of shape `(1,)`. It comes from torch's own generator, which gradient checkpointing puts back
            before it repeats a call, and it stays on the device: nothing waits for it.
        """
        return torch.randint(self.num_experts, (1,), device=self.weight.device)

    def expert(self, index: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One expert.

        Args:
            index (`int` or `torch.Tensor` of shape `(1,)`): Which.

        Returns:
            Its weight `(..., O, I)` and its bias `(O,)`.
        """
        if not isinstance(index, torch.Tensor):
            index = torch.tensor([index], device=self.weight.device)
        start: Any = 0.0 if self.initial is None else self.initial.to(self.weight.dtype)
        weight = torch.where(torch.eq(self.assign, index.to(torch.uint8)), self.weight, start)
        return weight, None if self.bias is None else self.bias.index_select(0, index).squeeze(0)

    def merged(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mean of the experts.

        Without gradients it is formed once and kept, until V or the biases are edited (an edit through `.data`, which
        torch does not record, shows after the next `train()` or `eval()`).

        Returns:
            Weight `(..., O, I)` and bias `(O,)`.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference():
            return self._merge()
        tensors: tuple[torch.Tensor | None, ...] = (self.weight, self.bias, self.initial)
        sources = tuple(t for t in tensors if t is not None)
        versions = tuple((t._version, t.data_ptr()) for t in sources)
        kept = self._cache
        # `is`: a tensor of a new layer may have the address and the version of one that is gone
        if kept is None or kept.versions != versions or any(map(operator.is_not, kept.sources, sources)):
            self._cache = kept = _Merged(*self._merge(), sources, versions)
        return kept.weight, kept.bias

    def _merge(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        share = self.merge_scale / self.num_experts
        if self.initial is None:
            weight = self.weight * share
        else:
            weight = torch.lerp(self.initial.to(self.weight.dtype), self.weight, share)
        return weight, None if self.bias is None else self.bias.mean(0)

    def current(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An expert that is drawn now in training, the merged weight otherwise."""
        return self.expert(self.draw()) if self.training else self.merged()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the expert of this call.

        Args:
            x (`torch.Tensor` of shape `(..., I)`): The input.

        Returns:
            `torch.Tensor` of shape `(..., O)`.
        """
        weight, bias = self.current()
        return nn.functional.linear(x, weight, bias)

    @torch.no_grad()
    def collapse_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Writes the merged weight and bias into those of a plain layer."""
        merged, merged_bias = self._merge()
        weight.copy_(merged)
        if bias is not None and merged_bias is not None:
            bias.copy_(merged_bias)

    def train(self, mode: bool = True) -> "SplitLinear":
        """As usual; what was kept of the merged weight is forgotten."""
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, num_experts={self.num_experts}, merge_scale={self.merge_scale}"
