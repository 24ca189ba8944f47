"""A routing report as a Markdown page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .drawing import evenly_spaced
from .groups import total_variation


if TYPE_CHECKING:
    from .report import LayerReport, RoutingReport, TokenExample
    from .shift import ShiftReport


__all__ = ["markdown_table", "render_markdown", "render_shift"]

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
        *_cost(report),
        "## Layers",
        markdown_table(report.table()),
        "*Max violation*: load of the busiest expert over the mean load, minus 1; 0 is even. *Entropy*: of the "
        "router's distribution, mean over tokens; ln N would be undecided. *Entropy of the mean*: ln N where the "
        "text as a whole uses all experts alike; its distance to the column before is how much the token decides. "
        "*Shift by class*, *by position*: share of the assignments that would have to move for all classes of tokens, "
        "or all positions in a window, to be routed alike; 0 where they do not matter.",
        *_classes(report),
    ]
    for name, caption in plots.items():
        parts.append(f"![{caption}]({name})\n\n{caption}")
    parts += _examples(report)
    return "\n\n".join(parts) + "\n"


def _cost(report: "RoutingReport") -> list[str]:
    if report.flops_per_token is None or report.flops_share is None:
        return []
    return [
        f"A token's forward pass takes {report.flops_per_token / 1e6:,.1f} million floating-point operations, "
        f"{report.flops_share:.1%} of what all experts would (products with weights; attention's own are left out)."
    ]


def render_shift(report: "ShiftReport") -> str:
    """The page of a routing shift.

    Args:
        report ([`ShiftReport`]): What to describe.

    Returns:
        `str`: Markdown.
    """
    metrics = report.metrics()
    if report.paired:
        summary = (
            f"The same {report.tokens_a:,} tokens through {len(report.layers)} MoE layers. Means over layers: of the "
            f"experts chosen for a token {metrics['selection_shift']:.1%} are others in B (worst layer "
            f"{metrics['selection_shift_worst_layer']:.1%}), {metrics['best_shift']:.1%} of the tokens have another "
            f"most probable expert, and the load of the experts shifted by {metrics['load_shift']:.1%}."
        )
    else:
        summary = (
            f"{report.tokens_a:,} tokens in A and {report.tokens_b:,} other tokens in B, through {len(report.layers)} "
            f"MoE layers. The load of the experts shifts by {metrics['load_shift']:.1%}, mean over layers (worst "
            f"layer {metrics['load_shift_worst_layer']:.1%}). Small texts differ by chance too."
        )
    caption = "Above: how much of the routing differs, by layer. Below: experts that B uses more (red) or less (blue)."
    parts = [
        f"# Routing shift\n\nA: {report.name_a}\n\nB: {report.name_b}",
        summary,
        "## Layers",
        markdown_table(report.table()),
        "Shifts are shares, 0 to 1. *Load shift*: of the assignments, those that would have to move to another expert "
        "for both loads to be equal. *Probability shift*: the same for the mean distribution of the router."
        + (
            " *Selection shift*: of the experts chosen for a token in A, those not chosen in B. *Token shift*: total "
            "variation of the router's two distributions for a token."
            if report.paired
            else ""
        ),
        f"![{caption}](routing_shift.png)\n\n{caption}",
    ]
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


def _classes(report: "RoutingReport") -> list[str]:
    """A table of the classes: which expert each prefers in the layer where class matters most."""
    if len(report.token_classes) < 2:
        return []
    layer = max(report.layers, key=report.class_shift)
    rows = []
    for name, size in report.token_classes.items():
        load = layer.class_load[name]
        best = max(range(layer.num_experts), key=load.__getitem__)
        rows.append(
            {
                "Class": name,
                "Tokens": f"{size / report.num_tokens:.1%}",
                "Busiest expert": f"{layer.expert_labels[best]} ({load[best]:.0%})",
                "Shift": f"{total_variation(load, layer.load):.2f}",
            }
        )
    return [
        "## Routing by class of token",
        f"In {layer.name}, where the class matters most. *Shift*: share of the class's assignments that would have to "
        "move for it to be routed like the whole text.",
        markdown_table(rows),
    ]


def _examples(report: "RoutingReport") -> list[str]:
    chosen = evenly_spaced(len(report.layers), MAX_EXAMPLE_LAYERS)
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
