"""The comparisons as a table and as a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from .measure import TRANSFORMERS, Comparison


__all__ = ["markdown_table", "plot"]


def markdown_table(comparisons: Sequence[Comparison]) -> str:
    """One line per cell: every implementation relative to the fastest of transformers' own (below 1 is faster), and
    which fraction of the machine's limit `hf_moe` reaches.

    Args:
        comparisons (`Sequence[Comparison]`): Cells with the same implementations of ours.

    Returns:
        `str`: Markdown.
    """
    ours = [name for name in dict.fromkeys(n for c in comparisons for n in c.seconds) if _is_ours(name)]
    head = ["bank", "dtype", "regime", "tokens", "best of transformers", "ms", *ours, "path", "of the limit"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for cell in comparisons:
        best = cell.best_of_transformers
        row = [str(cell.geometry), cell.dtype, cell.regime, str(cell.tokens), best]
        row.append(f"{1e3 * statistics.median(cell.seconds[best]):.2f}")
        row += [f"{cell.ratio(name):.2f}" if name in cell.seconds else "" for name in ours]
        fastest = "hf_moe" if "hf_moe" in cell.seconds else ours[0]
        row += [cell.path, f"{100 * cell.ratio('limit', fastest):.0f} %"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def plot(comparisons: Sequence[Comparison], path: str | Path) -> Path:
    """Time relative to the best of transformers against the number of tokens, one panel per bank and dtype.

    Args:
        comparisons (`Sequence[Comparison]`): Cells.
        path (`str` or `Path`): PNG or SVG file.

    Returns:
        `Path`

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib. Run `pip install hf-moe[demo]`.") from error

    panels: dict[tuple[str, str, str], list[Comparison]] = {}
    for cell in comparisons:
        panels.setdefault((str(cell.geometry), cell.dtype, cell.regime), []).append(cell)
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (title, cells) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in dict.fromkeys(n for cell in cells for n in cell.seconds):
            points = [(cell.tokens, cell.ratio(name)) for cell in cells if name in cell.seconds]
            style = {"color": "black", "linestyle": ":"} if name == "limit" else {"marker": "o", "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.axhline(1.0, color="grey", linewidth=0.5)
        axes.set(title="\n".join((title[0], ", ".join(title[1:]))), xscale="log", xlabel="tokens", ylim=(0, 2))
        axes.title.set_fontsize(9)
    figure.axes[0].set_ylabel("time / best of transformers")
    figure.axes[-1].legend(fontsize=7)
    path = Path(path)
    figure.savefig(path)
    return path


def _is_ours(name: str) -> bool:
    return name not in TRANSFORMERS and name != "limit"
