"""Rates of convergence, measured: errors over sample sizes, and the slope of their logarithms."""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from .rate_experiment import RateExperiment


__all__ = ["RateStudy", "Slope", "rate_study"]

RESAMPLES = 1000


@dataclass(frozen=True)
class Slope:
    """A slope of log error on log n.

    Args:
        value (`float`): Least-squares line through the logarithms of the mean errors.
        low, high (`float`): 95% interval, from repetitions drawn again with replacement (percentile bootstrap).
        intercept (`float`): Logarithm of the line's value at n = 1.
        theory (`float`, *optional*): What is proved.
    """

    value: float
    low: float
    high: float
    intercept: float
    theory: float | None = None


@dataclass(frozen=True)
class RateStudy:
    """Errors of every fit of one experiment.

    Args:
        name (`str`): The experiment's.
        sizes (`tuple[int, ...]`): Sample sizes n, ascending.
        errors (`Mapping[str, np.ndarray]`): Error to values `(sizes, repetitions)`.
        theory (`Mapping[str, float]`): Error to the slope that is proved.
    """

    name: str
    sizes: tuple[int, ...]
    errors: Mapping[str, np.ndarray]
    theory: Mapping[str, float]

    def slope(self, error: str, first: int = 0) -> Slope:
        """The slope of one error.

        Args:
            error (`str`): One of `errors`.
            first (`int`, defaults to 0): Index of the first sample size of the line. Over-specified fits depend on it.

        Returns:
            [`Slope`]

        Raises:
            ValueError: fewer than two sample sizes from `first` on.
        """
        if len(self.sizes) - first < 2:
            raise ValueError(
                f"`first={first}` leaves fewer than two of the {len(self.sizes)} sample sizes for a line."
            )
        values = self.errors[error][first:]
        log_sizes = np.log(self.sizes[first:])
        chosen = np.random.default_rng(0).integers(values.shape[1], size=(RESAMPLES, *values.shape))
        resampled = np.take_along_axis(values[None], chosen, axis=-1).mean(-1)  # (resamples, sizes)
        # An error of exactly 0 has no logarithm.
        tiny = np.finfo(float).tiny
        slopes = np.polyfit(log_sizes, np.log(np.maximum(resampled, tiny)).T, 1)[0]
        value, intercept = np.polyfit(log_sizes, np.log(np.maximum(values.mean(-1), tiny)), 1)
        low, high = np.quantile(slopes, [0.025, 0.975])
        return Slope(float(value), float(low), float(high), float(intercept), self.theory.get(error))

    def table(self, first: int = 0) -> list[dict[str, str]]:
        """One row per error: its mean at the smallest and at the largest n, the slope, its interval, the theory's.

        Args:
            first (`int`, defaults to 0): As in [`~RateStudy.slope`].

        Returns:
            `list[dict[str, str]]`: For `hf_moe.reporting.markdown.markdown_table`.
        """
        rows = []
        for error, values in self.errors.items():
            slope = self.slope(error, first)
            rows.append(
                {
                    "experiment": self.name,
                    "error": error,
                    f"n = {self.sizes[first]}": f"{values[first].mean():.4f}",
                    f"n = {self.sizes[-1]}": f"{values[-1].mean():.4f}",
                    "slope": f"{slope.value:.3f}",
                    "95% interval": f"{slope.low:.3f} to {slope.high:.3f}",
                    "theory": "" if slope.theory is None else f"{slope.theory:.3f}",
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists and numbers, for JSON."""
        return {
            "name": self.name,
            "sizes": list(self.sizes),
            "errors": {error: values.tolist() for error, values in self.errors.items()},
            "slopes": {error: vars(self.slope(error)) for error in self.errors},
        }


def rate_study(
    experiment: RateExperiment, sizes: Sequence[int], repetitions: int, seed: int = 0, processes: int = 1
) -> RateStudy:
    """Runs an experiment at every sample size, with fresh data for every repetition.

    Args:
        experiment ([`RateExperiment`]): What to do.
        sizes (`Sequence[int]`): Sample sizes.
        repetitions (`int`): Fits per sample size.
        seed (`int`, defaults to 0): Of the data and the starts.
        processes (`int`, defaults to 1): Fits at a time. More than one start new interpreters: call it under
            `if __name__ == "__main__"`.

    Returns:
        [`RateStudy`]: The same whatever `processes`.

    Raises:
        ValueError: fewer than two sample sizes, or no repetition.

    Example:

    ```python
    >>> study = rate_study(experiment, [1000, 10_000, 100_000], repetitions=20)
    >>> study.slope("D1").value
    ```
    """
    sizes = tuple(sorted({int(size) for size in sizes}))
    if len(sizes) < 2 or sizes[0] < 1:
        raise ValueError(f"`sizes` must hold at least two different positive numbers, got {list(sizes)}.")
    if repetitions < 1 or processes < 1:
        raise ValueError(f"`repetitions` and `processes` must be positive, got {repetitions} and {processes}.")
    # The largest first: no process then waits for a long one at the end.
    jobs = [(size, repetition) for size in reversed(sizes) for repetition in range(repetitions)]
    columns = [*zip(*jobs, strict=True), repeat(seed)]
    if processes == 1:
        measured = list(map(experiment.run, *columns))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread) as pool:
            measured = list(pool.map(experiment.run, *columns))
    shape = (len(sizes), repetitions)
    errors = {
        error: np.array([values[error] for values in measured]).reshape(shape)[::-1] for error in experiment.errors
    }
    return RateStudy(experiment.name, sizes, errors, dict(experiment.theory))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
