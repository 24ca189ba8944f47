"""The adapters that stand beside a module: a bottleneck or a low-rank product, whose weights are split into experts.

Each is a plain adapter whose split layers have one tensor's worth of weights, and collapses into just that adapter.
"""

import math
from typing import Any

import torch
from torch import nn

from hf_moe.adapters.core import Bottleneck

from .split import SplitLinear


__all__ = ["LowRank", "SplitBottleneck", "SplitLowRank"]


class SplitBottleneck(Bottleneck):
    """A [`~hf_moe.adapters.core.Bottleneck`] whose down projection, up projection or both are split.

    Args:
        num_experts (`int`): M.
        share (`str`): What is *not* split and trains in every step: `"down"`, `"up"` or `"none"`.
        seed (`int`): Of the partitions.
        merge_scale (`float`, defaults to 1.0): See [`SplitLinear`].
        **settings: As for [`~hf_moe.adapters.core.Bottleneck`].
    """

    def __init__(self, *, num_experts: int, share: str, seed: int, merge_scale: float = 1.0, **settings: Any):
        super().__init__(**settings)
        self._settings = settings
        trained = not settings.get("init_weights", True)
        if share != "down":
            self.down: Any = SplitLinear(self.down, num_experts, seed, merge_scale, from_zero=False, trained=trained)
        if share != "up":
            self.up: Any = SplitLinear(self.up, num_experts, seed + 1, merge_scale, trained=trained)

    @torch.no_grad()
    def collapse(self) -> Bottleneck:
        """The plain bottleneck that gives what this one gives in evaluation."""
        with torch.random.fork_rng(devices=[]):  # its own weights are drawn and overwritten
            plain = Bottleneck(**self._settings)
        plain.to(self.up.weight.device, self.up.weight.dtype)
        if plain.norm is not None and self.norm is not None:
            plain.norm.load_state_dict(self.norm.state_dict())
        for mine, its in ((self.down, plain.down), (self.up, plain.up)):
            _copy(mine, its)
        return _like(plain, self)


class LowRank(nn.Module):
    """`scale * B A x`: an addition to a weight, for which the usual name is LoRA.

    Shapes: O outputs, I inputs, R the rank; S the leading dimensions of stacked weights, none for a linear layer.

    Args:
        shape (`tuple[int, ...]`): (*S, O, I), of the weight that is added to.
        rank (`int`): R.
        dropout (`float`, defaults to 0.0): Of the input.
        scale (`float`, defaults to 1.0): Factor of the result.
        init_weights (`bool`, defaults to `True`): B starts at zero; `False` draws it.
    """

    def __init__(
        self, shape: tuple[int, ...], rank: int, *, dropout: float = 0.0, scale: float = 1.0, init_weights: bool = True
    ):
        super().__init__()
        *stack, out_features, in_features = shape
        self.down: Any = Factor(*stack, rank, in_features)  # A
        self.up: Any = Factor(*stack, out_features, rank)  # B
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self._settings = {"shape": shape, "rank": rank, "dropout": dropout, "scale": scale}
        # uniform over +-1/sqrt(I), as PEFT draws A
        nn.init.uniform_(self.down.weight, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        nn.init.zeros_(self.up.weight) if init_weights else nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the output.

        Args:
            x (`torch.Tensor` of shape `(..., I)`): Input of the linear layer.

        Returns:
            `torch.Tensor` of shape `(..., O)`.
        """
        result = self.up(self.down(self.dropout(x)))
        return result if self.scale == 1.0 else result * self.scale

    def delta(self, merged: bool = True) -> torch.Tensor:
        """What is added to the weight, (*S, O, I).

        Args:
            merged (`bool`, defaults to `True`): The weight of evaluation; `False` draws experts if in training.
        """
        up, down = ((f.merged() if merged else f.current())[0] for f in (self.up, self.down))
        return self.scale * (up @ down)


class Factor(nn.Module):
    """A weight (*S, O, I) without bias, plain: nothing to draw, nothing to merge."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))

    def current(self) -> tuple[torch.Tensor, None]:
        """The weight, and no bias."""
        return self.weight, None

    merged = current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T`, for a weight of two dimensions."""
        return nn.functional.linear(x, self.weight)


class SplitLowRank(LowRank):
    """A [`LowRank`] one or both of whose factors are split.

    Args:
        num_experts (`int`): M.
        share (`str`): The factor that is *not* split: `"down"` (A), `"up"` (B) or `"none"`.
        seed (`int`): Of the partitions.
        merge_scale (`float`, defaults to 1.0): See [`SplitLinear`].
        **settings: As for [`LowRank`].
    """

    def __init__(self, *, num_experts: int, share: str, seed: int, merge_scale: float = 1.0, **settings: Any):
        super().__init__(**settings)
        trained = not settings.get("init_weights", True)
        if share != "down":
            self.down = SplitLinear(self.down.weight, num_experts, seed, merge_scale, from_zero=False, trained=trained)
        if share != "up":
            self.up = SplitLinear(self.up.weight, num_experts, seed + 1, merge_scale, trained=trained)

    @torch.no_grad()
    def collapse(self) -> LowRank:
        """The plain product that gives what this one gives in evaluation."""
        with torch.random.fork_rng(devices=[]):
            plain = LowRank(**self._settings)
        plain.to(self.up.weight.device, self.up.weight.dtype)
        for mine, its in ((self.down, plain.down), (self.up, plain.up)):
            _copy(mine, its)
        return _like(plain, self)


def _copy(mine: nn.Module, its: Any) -> None:
    if isinstance(mine, SplitLinear):
        mine.collapse_into(its.weight, getattr(its, "bias", None))
    else:
        its.load_state_dict(mine.state_dict())


def _like(plain: Any, cell: nn.Module) -> Any:
    """`plain` with the mode of `cell`, and training if `cell` did."""
    trains = any(parameter.requires_grad for parameter in cell.parameters())
    return plain.train(cell.training).requires_grad_(trains)
