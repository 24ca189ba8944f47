"""The picture of a routing shift. Drawn without pyplot, like the others.

Shapes: L MoE layers, N experts.
"""

from typing import TYPE_CHECKING

import numpy as np

from .drawing import DPI, short_name, ticks


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .shift import ShiftReport


__all__ = ["draw_shift"]


def draw_shift(report: "ShiftReport") -> "Figure":
    """Above, how much of each layer's routing changed; below, which experts gained or lost.

    Args:
        report ([`ShiftReport`]): What to draw.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed. Run `pip install matplotlib`.") from error

    layers = report.layers
    width = max(layer.num_experts for layer in layers)
    moved = np.full((width, len(layers)), np.nan)  # (N, L); experts that a narrower layer lacks stay empty
    for column, layer in enumerate(layers):
        moved[: layer.num_experts, column] = np.array(layer.load_b) - np.array(layer.load_a)
    size = (max(7.0, min(3 + 0.32 * len(layers), 16)), 3.6 + max(2.2, min(0.26 * width, 9)))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.0, size[1] - 3.0])
    x = np.arange(len(layers))
    if report.paired:
        above.plot(x, [layer.selection_shift for layer in layers], "o-", color="tab:red", label="experts of a token")
        above.plot(x, [layer.token_shift for layer in layers], "^-", color="tab:orange", label="its distribution")
    above.plot(x, [layer.load_shift for layer in layers], "s--", color="tab:blue", label="load as a whole")
    above.set_ylim(0, 1.02)
    above.set_ylabel("share that differs")
    above.grid(alpha=0.3)
    above.legend(fontsize=8, loc="best")
    bound = max(float(np.nanmax(np.abs(moved))), 1e-3)
    image = below.imshow(moved * 100, aspect="auto", cmap="RdBu_r", vmin=-100 * bound, vmax=100 * bound)
    places, labels = ticks(max(layers, key=lambda layer: layer.num_experts).expert_labels, limit=24)
    below.set_yticks(places, labels, fontsize=7)
    below.set(ylabel="expert", xlabel="MoE layer, in the order of the model")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=below, label="load B - load A (percentage points)")
    text = f"{report.tokens_a:,} tokens" + ("" if report.paired else f" and {report.tokens_b:,}")
    figure.suptitle(
        f"Routing shift, {text}\nA: {short_name(report.name_a)}   B: {short_name(report.name_b)}", fontsize=10
    )
    return figure
