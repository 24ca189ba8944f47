"""Pictures of a routing report. Drawn without pyplot: no window, no state shared with the user's own figures.

Shapes: L MoE layers, N experts.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .drawing import DPI, evenly_spaced, report_title, ticks, write_figure
from .group_plots import draw_classes, draw_positions


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import RoutingReport


__all__ = ["draw_coactivation", "draw_entropy", "draw_load", "relative_coactivation", "save_plots"]

# More panels than this are not read by anybody; evenly spaced layers are shown, and the title says so.
MAX_COACTIVATION_PANELS = 9
# Pairs expected together less often than this say nothing, whatever was counted.
MIN_EXPECTED = 5
# Where the colours of the co-activation end; the colour bar has an arrow there.
MAX_RATIO = 3.0
# Numbers are written into cells as long as they stay legible.
MAX_ANNOTATED_CELLS = 260


def save_plots(report: "RoutingReport", directory: Path) -> dict[str, str]:
    """Draws every plot of a report.

    Args:
        report ([`RoutingReport`]): What to draw.
        directory (`Path`): An existing folder.

    Returns:
        `dict[str, str]`: File name to caption, in reading order. Co-activation is left out where every token goes to
        one expert, a plot by group where there is one group.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed. Run `pip install matplotlib`.") from error

    drawings = {
        "expert_load.png": (
            draw_load,
            "Load of each expert relative to an even split (1 = even). × marks experts that received no token.",
        ),
        "routing_entropy.png": (
            draw_entropy,
            "Above: entropy of the router's distribution, per token and of its mean; the gap is how much the token "
            "decides. Below: how far the busiest expert is above the mean load (0 = even).",
        ),
        "coactivation.png": (
            draw_coactivation,
            "How often two experts process the same token, relative to what their loads alone would give (1 is "
            "chance). Gray: the diagonal, and pairs too rare to tell.",
        ),
        "token_classes.png": (
            draw_classes,
            "Which experts a class of tokens prefers (red) or avoids (blue), relative to the whole text.",
        ),
        "positions.png": (
            draw_positions,
            "The same for the position of a token in its window of text.",
        ),
    }
    captions = {}
    for name, (draw, caption) in drawings.items():
        figure = draw(report)
        if figure is not None:
            write_figure(figure, directory / name)
            captions[name] = caption
    return captions


def draw_load(report: "RoutingReport") -> "Figure":
    """Heat map, layers x experts, of load / even load.

    Args:
        report ([`RoutingReport`]): What to draw.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.colors import TwoSlopeNorm

    layers = report.layers
    width = max(layer.num_experts for layer in layers)
    relative = np.full((len(layers), width), np.nan)  # (L, N); experts that a narrower layer lacks stay empty
    for row, layer in enumerate(layers):
        relative[row, : layer.num_experts] = np.array(layer.load) * layer.num_experts
    figure, axes = _figure(
        width=min(max(5.5, 2.6 + 0.62 * width if width <= 24 else 2.6 + 0.12 * width), 18),
        height=min(max(3.0, 1.6 + 0.34 * len(layers)), 16),
    )
    top = max(2.0, float(np.nanmax(relative)))
    image = axes.imshow(
        relative, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top), interpolation="nearest"
    )
    for row, column in np.argwhere(relative == 0):
        axes.text(column, row, "×", ha="center", va="center", color="white", fontsize=9)
    if relative.size <= MAX_ANNOTATED_CELLS:
        for (row, column), value in np.ndenumerate(relative):
            if value > 0:
                dark = value < 0.35 or value > 1 + 0.65 * (top - 1)
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    bar = figure.colorbar(image, ax=axes, label="load / even load")
    bar.ax.axhline(1.0, color="black", linewidth=1.2)
    places, labels = ticks(max(layers, key=lambda layer: layer.num_experts).expert_labels, limit=24)
    axes.set_xticks(places, labels, fontsize=7, rotation=90 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(*ticks([layer.name for layer in layers], limit=40), fontsize=7)
    axes.set(xlabel="expert", ylabel="MoE layer")
    axes.set_title(f"Expert load: {report_title(report)}", fontsize=10)
    return figure


def draw_entropy(report: "RoutingReport") -> "Figure":
    """Entropies and balance violation by layer.

    Args:
        report ([`RoutingReport`]): What to draw.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = report.layers
    x = np.arange(len(layers))
    figure = Figure(figsize=(max(6.0, min(3 + 0.3 * len(layers), 14)), 5.6), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    uniform = [math.log(layer.num_experts) for layer in layers]
    above.plot(x, uniform, "--", color="gray", label="ln N: all experts alike")
    above.plot(
        x, [layer.marginal_entropy for layer in layers], "s-", color="tab:blue", label="of the mean distribution"
    )
    above.plot(x, [layer.entropy for layer in layers], "o-", color="tab:orange", label="mean over tokens")
    above.set_ylim(0, 1.12 * max(max(uniform), 0.1))
    above.set_ylabel("routing entropy (nats)")
    above.legend(fontsize=8, loc="best")
    above.set_title(f"Routing entropy and balance: {report_title(report)}", fontsize=10)
    violation = [layer.max_violation for layer in layers]
    below.bar(x, violation, color="tab:red", width=0.7)
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylim(0, max(1.0, 1.1 * max(violation)))
    below.set_ylabel("max violation\n(0 = even load)")
    below.set_xlabel("MoE layer (in order)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def draw_coactivation(report: "RoutingReport") -> "Figure | None":
    """How often two experts share a token, relative to chance, one panel per layer.

    Args:
        report ([`RoutingReport`]): What to draw.

    Returns:
        `matplotlib.figure.Figure`, or `None` where no token went to two experts.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    together = [layer for layer in report.layers if layer.active_experts > 1 and layer.num_experts > 1]
    if not together:
        return None
    shown = [together[i] for i in evenly_spaced(len(together), MAX_COACTIVATION_PANELS)]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(3.4 * columns + 0.9, 6.5), 3.2 * rows + 0.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=MAX_RATIO)
    for axes, layer in zip(panels, shown, strict=False):
        ratio = relative_coactivation(np.array(layer.coactivation))
        axes.imshow(ratio, cmap="RdBu_r", norm=norm, interpolation="nearest")
        axes.set_facecolor("darkgray")
        axes.set_title(layer.name, fontsize=9)
        places, labels = ticks(layer.expert_labels, limit=12 if layer.num_experts <= 100 else 8)
        axes.set_xticks(places, labels, fontsize=7, rotation=90 if max(map(len, labels)) > 3 else 0)
        axes.set_yticks(places, labels, fontsize=7)
        axes.set_xlabel("expert", fontsize=8)
        axes.set_ylabel("expert", fontsize=8)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    bar = figure.colorbar(
        panels[0].images[0],
        ax=list(panels),
        label="tokens shared / expected from the loads (1 = chance)",
        shrink=0.9,
        extend="max",
    )
    bar.ax.axhline(1.0, color="black", linewidth=1.2)
    note = "" if len(shown) == len(report.layers) else f", {len(shown)} of {len(report.layers)} layers"
    gray = f"gray: the diagonal, and pairs expected less than {MIN_EXPECTED} times"
    figure.suptitle(f"Co-activation: {report_title(report)}{note}\n{gray}", fontsize=10)
    return figure


def relative_coactivation(counts: np.ndarray) -> np.ndarray:
    """C_ij / E_ij, where E_ij = a_i a_j off the diagonal has the same row sums as C (quasi-independence): what one
    would see if partners were drawn by popularity alone. Raw shares would only repeat the load.

    Args:
        counts (`np.ndarray` of shape `(N, N)`): Tokens that both experts processed.

    Returns:
        `np.ndarray` of shape `(N, N)`: nan on the diagonal and where fewer than `MIN_EXPECTED` tokens are expected.
    """
    pairs = counts.astype(float)
    np.fill_diagonal(pairs, 0.0)
    rows = pairs.sum(axis=1)
    popularity = np.sqrt(rows)
    for _ in range(200):  # iterative proportional fitting; symmetric, hence the square root
        fitted = popularity * (popularity.sum() - popularity)
        popularity *= np.sqrt(np.divide(rows, fitted, out=np.zeros_like(rows), where=fitted > 0))
    expected = np.outer(popularity, popularity)
    np.fill_diagonal(expected, 0.0)
    return np.divide(pairs, expected, out=np.full_like(pairs, np.nan), where=expected >= MIN_EXPECTED)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()
