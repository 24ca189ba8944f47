"""The convergence plots of the papers: error over n on logarithmic axes, with the fitted line and the theory's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_moe.reporting.drawing import DPI, write_figure

from .rate_study import RateStudy


__all__ = ["plot_rates"]


def plot_rates(studies: Sequence[RateStudy], error: str, path: str | Path, title: str | None = None) -> Path:
    """Draws one error of several studies.

    Points are means, bars twice their standard error over repetitions; solid the least-squares line, dashed a line of
    the theory's slope through the first point.

    Args:
        studies (`Sequence[RateStudy]`): One curve each.
        error (`str`): Which of their errors.
        path (`str` or `Path`): PNG file to write.
        title (`str`, *optional*): Above the plot.

    Returns:
        `Path`: The file.

    Raises:
        ImportError: matplotlib is missing.

    Example:

    ```python
    >>> plot_rates([study], "D1", "d1.png")
    ```
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as matplotlib_error:
        raise ImportError("`plot_rates` needs matplotlib. Run `pip install matplotlib`.") from matplotlib_error
    figure = Figure(figsize=(6.4, 4.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for index, study in enumerate(studies):
        color, sizes, values = f"C{index}", np.array(study.sizes), study.errors[error]
        slope, means = study.slope(error), values.mean(-1)
        spread = 2 * values.std(-1) / np.sqrt(values.shape[1])
        lower = np.minimum(spread, 0.9 * means)  # a logarithmic axis has no zero
        axes.errorbar(sizes, means, yerr=[lower, spread], fmt="o", color=color, markersize=4, capsize=2)
        line = np.exp(slope.intercept) * sizes**slope.value
        axes.plot(sizes, line, color=color, label=f"{study.name}: slope {slope.value:.2f}")
        if slope.theory is not None:
            axes.plot(sizes, means[0] * (sizes / sizes[0]) ** slope.theory, "--", color=color, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="sample size n", ylabel=f"mean error ({error})", title=title or error)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, path)
    return path
