"""What the plots of reports share."""

import math
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import RoutingReport


__all__ = ["DPI", "evenly_spaced", "report_title", "short_name", "ticks", "write_figure"]

DPI = 130


def ticks(labels: list[str], limit: int) -> tuple[list[int], list[str]]:
    """Every label, or evenly spaced ones where there are more than `limit`.

    Args:
        labels (`list[str]`): All labels.
        limit (`int`): Labels to show at most.

    Returns:
        `tuple`: places, their labels.
    """
    shown = list(range(0, len(labels), math.ceil(len(labels) / limit)))
    return shown, [labels[i] for i in shown]


def evenly_spaced(length: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0 to `length - 1`, the first and the last among them.

    Args:
        length (`int`): How many there are.
        limit (`int`): How many to take.

    Returns:
        `list[int]`
    """
    if limit >= length:
        return list(range(length))
    return sorted({round(i * (length - 1) / max(limit - 1, 1)) for i in range(limit)})


def short_name(name: str, limit: int = 48) -> str:
    """The end of a long name: what tells models apart comes last.

    Args:
        name (`str`): A model.
        limit (`int`, defaults to 48): Characters at most.

    Returns:
        `str`
    """
    return name if len(name) <= limit else "…" + name[1 - limit :]


def report_title(report: "RoutingReport") -> str:
    """Model and size of a report.

    Args:
        report ([`RoutingReport`]): What is drawn.

    Returns:
        `str`
    """
    return f"{short_name(report.model_name)}, {report.num_tokens:,} tokens"


def write_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG file.

    Args:
        figure (`matplotlib.figure.Figure`): Made without pyplot.
        path (`Path`): Where to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(path)
