"""Pictures of how groups of tokens are routed: by class, by position. Drawn without pyplot, like the others.

Shapes: G groups, N experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .drawing import DPI, evenly_spaced, report_title, ticks


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import LayerReport, RoutingReport


__all__ = ["draw_classes", "draw_positions", "relative_load"]

MAX_PANELS = 6
# Shares are compared to those of the whole text up to this factor, on a logarithmic scale.
MAX_FACTOR = 8.0
# Rows of fewer tokens are left out: three tokens have a busiest expert too.
MIN_TOKENS = 10


def draw_classes(report: "RoutingReport") -> "Figure | None":
    """Which experts each class of tokens prefers, one panel per layer.

    Args:
        report ([`RoutingReport`]): What to draw.

    Returns:
        `matplotlib.figure.Figure`, or `None` where there are not two classes of at least `MIN_TOKENS` tokens.
    """
    return _draw(report, [layer.class_load for layer in report.layers], report.token_classes, "class of the token")


def draw_positions(report: "RoutingReport") -> "Figure | None":
    """The same for positions in the window.

    Args:
        report ([`RoutingReport`]): What to draw.

    Returns:
        `matplotlib.figure.Figure`, or `None` where there are not two bins of at least `MIN_TOKENS` tokens.
    """
    return _draw(report, [layer.position_load for layer in report.layers], report.positions, "position in the window")


def relative_load(loads: Mapping[str, Sequence[float]], names: Sequence[str], whole: Sequence[float]) -> np.ndarray:
    """log2 of a group's share of an expert over the whole text's, cut at `MAX_FACTOR`.

    Args:
        loads (`Mapping[str, Sequence[float]]`): Group to its N shares.
        names (`Sequence[str]`): The G groups to show.
        whole (`Sequence[float]`): N shares of all tokens.

    Returns:
        `np.ndarray` of shape `(G, N)`: nan for experts without any token.
    """
    shares, base = np.array([loads[name] for name in names]), np.array(whole)
    factor = np.divide(shares, base, out=np.full_like(shares, np.nan), where=base > 0)
    return np.log2(np.clip(factor, 1 / MAX_FACTOR, MAX_FACTOR))


def _draw(
    report: "RoutingReport", loads: Sequence[Mapping[str, Sequence[float]]], sizes: Mapping[str, int], label: str
) -> "Figure | None":
    from matplotlib.figure import Figure

    names = [name for name, size in sizes.items() if size >= MIN_TOKENS]
    if len(names) < 2:
        return None
    chosen = evenly_spaced(len(report.layers), MAX_PANELS)
    columns = min(len(chosen), 2 if max(layer.num_experts for layer in report.layers) <= 16 else 1)
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(
        figsize=(5.2 * columns + 1.6, (0.3 * len(names) + 1.0) * rows + 0.9), dpi=DPI, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    bound = math.log2(MAX_FACTOR)
    for axes, i in zip(panels, chosen, strict=False):
        layer: LayerReport = report.layers[i]
        image = axes.imshow(
            relative_load(loads[i], names, layer.load),
            aspect="auto",
            cmap="RdBu_r",
            vmin=-bound,
            vmax=bound,
            interpolation="nearest",
        )
        axes.set_facecolor("darkgray")
        axes.set_title(layer.name, fontsize=9)
        places, labels = ticks(layer.expert_labels, limit=16)
        axes.set_xticks(places, labels, fontsize=7, rotation=90 if max(map(len, labels)) > 3 else 0)
        axes.set_yticks(range(len(names)), [f"{name} ({sizes[name]:,})" for name in names], fontsize=7)
        axes.set_xlabel("expert", fontsize=8)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=list(panels), label="share of an expert, relative to the whole text", shrink=0.9)
    powers = range(-int(bound), int(bound) + 1)
    bar.set_ticks(list(powers), labels=[f"{2**p}x" if p >= 0 else f"1/{2**-p}x" for p in powers])
    note = "" if len(chosen) == len(report.layers) else f", {len(chosen)} of {len(report.layers)} layers"
    figure.suptitle(f"Routing by {label}: {report_title(report)}{note}\ntokens in brackets", fontsize=10)
    return figure
