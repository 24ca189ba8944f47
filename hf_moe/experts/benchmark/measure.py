"""Times of several implementations, taken in turns.

What makes them comparable: one round runs every implementation once, in rotating order; every call has a routing of
its own (a repeated one lets later calls use kernels that earlier ones generated); ratios are taken within a round,
and their median is reported. One thread and its CPU time, unless wall time is asked for: on a shared machine wall
time measures the others.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .geometry import Geometry, make_experts, make_routing


__all__ = ["TRANSFORMERS", "Comparison", "compare"]

#: Transformers' own implementations that run on CPU.
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")

# batched_mm copies the weights of every (token, expert) pair.
_MAX_COPIED_BYTES = 1 << 30


class Comparison(NamedTuple):
    """Seconds per call, by implementation and round.

    Args:
        geometry ([`Geometry`]): Bank.
        dtype (`str`): `"bfloat16"`, ...
        regime (`str`): `"inference"` or `"training"`.
        tokens (`int`): T.
        seconds (`dict[str, list[float]]`): One number per round; `"limit"` is the bound of the machine.
        path (`str`): What `"hf_moe"` chose.
    """

    geometry: Geometry
    dtype: str
    regime: str
    tokens: int
    seconds: dict[str, list[float]]
    path: str

    @property
    def best_of_transformers(self) -> str:
        """Name of the fastest of transformers' own."""
        return min((n for n in self.seconds if n in TRANSFORMERS), key=lambda n: statistics.median(self.seconds[n]))

    def ratio(self, name: str, reference: str | None = None) -> float:
        """Median over the rounds of an implementation's time by that of another in the same round.

        Args:
            name (`str`): Implementation, or `"limit"`.
            reference (`str`, *optional*): By default the fastest of transformers' own.
        """
        reference = self.best_of_transformers if reference is None else reference
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


def compare(
    implementations: Sequence[str],
    geometry: Geometry,
    dtype: torch.dtype,
    tokens: int,
    training: bool = False,
    rounds: int = 15,
    clock: Callable[[], float] = time.thread_time,
    seed: int = 0,
    experts: Any = None,
) -> Comparison:
    """Measures one cell.

    Args:
        implementations (`Sequence[str]`): Names for `experts_implementation`; transformers' own are always added.
        geometry ([`Geometry`]): Bank.
        dtype (`torch.dtype`): Dtype.
        tokens (`int`): T.
        training (`bool`, *optional*, defaults to `False`): Forward and backward (tokens, weights, router weights).
        rounds (`int`, *optional*, defaults to 15): Rounds after one that is not counted.
        clock (`Callable`, *optional*): Seconds; the thread's CPU time by default, `time.perf_counter` for wall time.
        seed (`int`, *optional*, defaults to 0): Of the routings.
        experts (`torch.nn.Module`, *optional*): The bank, if it was made before.

    Returns:
        [`Comparison`]

    Example:
        ```python
        cell = compare(["hf_moe"], GEOMETRIES["C"], torch.bfloat16, tokens=64)
        cell.ratio("hf_moe")
        ```
    """
    from hf_moe.experts.kernels import choose_path

    experts = make_experts(geometry, dtype) if experts is None else experts
    names = list(dict.fromkeys([*_own(geometry, tokens, dtype, training), *implementations]))
    generator = torch.Generator().manual_seed(seed)
    dense = _dense(geometry, tokens, dtype)
    stream = _stream_seconds_per_byte(dtype, clock)
    seconds: dict[str, list[float]] = {name: [] for name in [*names, "limit"]}
    path = "grouped_mm"
    for round_ in range(rounds + 1):
        shift = round_ % len(names)
        chosen = geometry.experts
        for name in names[shift:] + names[:shift]:
            hidden, index, weights = make_routing(geometry, tokens, dtype, generator)
            experts.config._experts_implementation = name
            chosen = min(chosen, int(index.unique().numel()))
            with torch.set_grad_enabled(training):
                path = choose_path(experts, hidden, index, weights)
                taken = _timed(experts, hidden, index, weights, training, clock)
            if round_:
                seconds[name].append(taken)
        start = clock()
        dense()
        products = (clock() - start) * (3 if training else 1)
        if round_:
            seconds["limit"].append(max(products, geometry.read_bytes(chosen, dtype) * stream))
    regime = "training" if training else "inference"
    return Comparison(geometry, str(dtype).removeprefix("torch."), regime, tokens, seconds, path)


def _own(geometry: Geometry, tokens: int, dtype: torch.dtype, training: bool) -> list[str]:
    copied = geometry.read_bytes(tokens * geometry.slots, dtype)
    return [name for name in TRANSFORMERS if name != "batched_mm" or (copied <= _MAX_COPIED_BYTES and tokens <= 8)]


def _timed(
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    training: bool,
    clock: Callable[[], float],
) -> float:
    if not training:
        start = clock()
        experts(hidden, index, weights)
        return clock() - start
    experts.zero_grad(set_to_none=True)
    hidden.requires_grad_()
    weights.requires_grad_()
    gradient = torch.ones_like(hidden)
    start = clock()
    experts(hidden, index, weights).backward(gradient)
    return clock() - start


def _dense(geometry: Geometry, tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    # the same number of operations as two products of one dense feed-forward on T * K rows
    rows = tokens * geometry.slots
    x, a = torch.randn(rows, geometry.hidden).to(dtype), torch.randn(rows, geometry.intermediate).to(dtype)
    up = torch.randn(2 * geometry.intermediate, geometry.hidden).to(dtype)
    down = torch.randn(geometry.hidden, geometry.intermediate).to(dtype)
    h, y = x.new_empty(rows, up.shape[0]), x.new_empty(rows, geometry.hidden)

    def run() -> None:
        torch.mm(x, up.t(), out=h)
        torch.mm(a, down.t(), out=y)

    return run


def _stream_seconds_per_byte(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    # a slab no cache holds, summed as integers: the quickest pass over memory that torch offers
    slab = torch.ones(1 << 24, dtype=torch.int64)
    best = float("inf")
    for _ in range(3):
        start = clock()
        slab.sum()
        best = min(best, clock() - start)
    return best / (slab.numel() * 8)
