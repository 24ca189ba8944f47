"""A routing report as a Markdown page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from .report import LayerReport, RoutingReport, TokenExample


__all__ = ["markdown_table", "render_markdown"]

# A page is for reading: report.json has every layer and expert.
MAX_EXAMPLE_LAYERS = 3
MAX_EXAMPLE_EXPERTS = 32


def render_markdown(report: "RoutingReport", plots: Mapping[str, str]) -> str:
    """The page of a report.

    Args:
        report ([`RoutingReport`]): What to describe.
        plots (`Mapping[str, str]`): File name in the same folder to caption.

    Returns:
        `str`: Markdown.
    """
    metrics = report.metrics()
    parts = [
        f"# Routing report: {report.model_name}",
        f"{report.num_tokens:,} tokens through {len(report.layers)} MoE layers. Means over layers: "
        f"{metrics['active_experts']:.2f} experts per token, routing entropy {metrics['routing_entropy']:.3f} nats "
        f"({metrics['marginal_entropy']:.3f} for the mean distribution), balance violation "
        f"{metrics['max_violation']:.2f}, {metrics['dead_share']:.1%} of the experts dead.",
        *_zero_computation(report),
        "## Layers",
        markdown_table(report.table()),
        "*Max violation*: load of the busiest expert over the mean load, minus 1; 0 is even. *Entropy*: of the "
        "router's distribution, mean over tokens; ln N would be undecided. *Entropy of the mean*: ln N where the "
        "text as a whole uses all experts alike; its distance to the column before is how much the token decides.",
    ]
    for name, caption in plots.items():
        parts.append(f"![{caption}]({name})\n\n{caption}")
    parts += _examples(report)
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Mapping[str, str | int]]) -> str:
    """Rows with the same keys as a Markdown table.

    Args:
        rows (`Sequence[Mapping]`): Column name to value; at least one row.

    Returns:
        `str`: Markdown.
    """
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _zero_computation(report: "RoutingReport") -> list[str]:
    shares = [layer.active_computing_experts / max(layer.active_experts, 1e-12) for layer in report.layers]
    if min(shares) > 1 - 1e-9:
        return []
    return [f"{1 - sum(shares) / len(shares):.1%} of the assignments went to zero-computation experts."]


def _examples(report: "RoutingReport") -> list[str]:
    chosen = sorted(set(np.linspace(0, len(report.layers) - 1, MAX_EXAMPLE_LAYERS).round().astype(int).tolist()))
    parts = [
        "## Tokens typical of an expert",
        "Tokens that an expert receives more often than other tokens do, the most informative first; behind each, "
        "the share of its occurrences that went to the expert. "
        f"{len(chosen)} of {len(report.layers)} layers; report.json has all.",
    ]
    for layer in (report.layers[i] for i in chosen):
        rows = [
            {"Expert": label, "Load": f"{load:.1%}", "Tokens": " ".join(map(_example, examples)) or "none preferred"}
            for label, load, examples in _experts(layer)
        ]
        parts.append(f"### {layer.name}")
        parts.append(markdown_table(rows))
        if len(rows) < layer.num_experts:
            parts.append(f"The first {len(rows)} of {layer.num_experts} experts.")
    return parts


def _experts(layer: "LayerReport"):
    return list(zip(layer.expert_labels, layer.load, layer.examples, strict=True))[:MAX_EXAMPLE_EXPERTS]


def _example(example: "TokenExample") -> str:
    # Inside a code span of a table cell only these two characters mean something; whitespace is made visible.
    text = example.text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence} {example.share:.0%}"
