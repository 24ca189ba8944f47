"""The table, the plot of accuracy and hallucination, and the plot of which experts see image tokens."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from data import prompt
from mosaics import picture
from questions import KINDS


__all__ = ["draw_experts", "draw_results", "routes", "summarise"]

GROUPS = ("new pictures", "new words", "new places")
COLUMNS = ("accuracy", *KINDS, "hallucination", "denial")


def routes(
    model: Any, processor: Any, groups: dict[str, Any], images: np.ndarray
) -> dict[str, dict[str, list[float]]]:
    """Shares of the tokens each expert sees, of image tokens and of all others, by layer: `{layer: {"image": ..}}`."""
    from hf_moe.reporting import routing_report

    asked = groups["new pictures"]
    batches = (
        processor(
            images=[picture(mosaic, images) for mosaic, _ in asked[start : start + 50]],
            text=[prompt(question.text) for _, question in asked[start : start + 50]],
            padding=True,
            return_tensors="pt",
        )
        for start in range(0, min(len(asked), 200), 50)
    )
    report = routing_report(model, processor, batches)
    found = {}
    for layer in report.layers:
        sizes = {name: size for name, size in report.token_classes.items() if name != "image" and size}
        text = [np.asarray(layer.class_load[name]) * size for name, size in sizes.items()]
        found[layer.name] = {
            "image": list(layer.class_load["image"]),
            "text": (np.sum(text, axis=0) / sum(sizes.values())).tolist(),
        }
    return found


def by_arm(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the same arm, the seeds in order; the baseline of frequent answers and the teacher first."""
    found: dict[str, list[dict[str, Any]]] = {
        "most frequent answer": [result["majority"]],
        "teacher": [result["teacher"]],
    }
    for row in result["rows"]:
        found.setdefault(row["arm"], []).append(row)
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over the seeds."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def summarise(result: dict[str, Any]) -> str:
    """Markdown tables: kinds of questions about held-out pictures, then new words and places, then differences."""
    arms = by_arm(result)
    seeds = len({row["seed"] for row in result["rows"]})
    lines = [
        f"Held-out pictures, {seeds} seed(s), mean ± standard deviation; parameters in millions.",
        "",
        f"| | parameters | activated | {' | '.join(COLUMNS)} | new words | new places |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for arm, rows in arms.items():
        sizes = [f"{rows[0][name]:.0f}" if name in rows[0] else "" for name in ("parameters", "activated")]
        cells = [spread([row["new pictures"][name] for row in rows]) for name in COLUMNS]
        cells += [spread([row[group]["accuracy"] for row in rows]) for group in GROUPS[1:]]
        lines.append(f"| {arm} | {' | '.join([*sizes, *cells])} |")
    lines.append("")
    for arm, rows in arms.items():
        if "routes" in rows[0]:
            apart = spread([distance(row["routes"]) for row in rows])
            lines.append(f"- {arm}: image and text tokens differ in {apart} of their choices of experts")
    pairs = (
        ("MoE-tuning", "dense, supervised"),
        ("mimic distillation", "MoE-tuning"),
        ("mimic + preference", "mimic, longer"),
    )
    for one, other in pairs:
        for column in ("accuracy", "hallucination"):
            values = zip(arms.get(one, []), arms.get(other, []), strict=True)
            gaps = [a["new pictures"][column] - b["new pictures"][column] for a, b in values]
            if gaps:
                lines.append(f"- {one} minus {other}, {column}: {', '.join(f'{gap:+.3f}' for gap in gaps)}")
    return "\n".join(lines) + "\n"


def distance(routes: dict[str, Any]) -> float:
    """Total variation between the shares of experts in image tokens and in text tokens, mean over layers."""
    gaps = [np.abs(np.subtract(layer["image"], layer["text"])).sum() / 2 for layer in routes.values()]
    return float(np.mean(gaps))


def draw_results(result: dict[str, Any], path: Path) -> None:
    """One dot per seed, a bar at the mean; the teacher and the most frequent answer as lines."""
    from matplotlib import pyplot as plt

    arms = by_arm(result)
    lines = {"teacher": "gray", "most frequent answer": "lightgray"}
    panels = [("new pictures", "accuracy"), ("new pictures", "hallucination"), ("new pictures", "denial")]
    panels += [(group, "accuracy") for group in GROUPS[1:]]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.2), layout="constrained")
    names = [name for name in arms if name not in lines]
    for axes, (group, column) in zip(all_axes, panels, strict=True):
        for x, name in enumerate(names):
            values = [row[group][column] for row in arms[name]]
            axes.plot([x] * len(values), values, "o", alpha=0.7)
            axes.hlines(mean(values), x - 0.25, x + 0.25, color="black")
        for name, color in lines.items():
            axes.axhline(arms[name][0][group][column], color=color, linestyle=":", label=name)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_title(f"{column}, {group}")
    all_axes[0].legend()
    figure.suptitle("Questions about held-out mosaics; one dot per seed, bar at the mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_experts(result: dict[str, Any], path: Path) -> None:
    """For each sparse arm (rows) and layer (columns): the share of each expert in image tokens and in text tokens."""
    from matplotlib import pyplot as plt

    arms = {arm: rows for arm, rows in by_arm(result).items() if "routes" in rows[0]}
    if not arms:
        return
    layers = list(next(iter(arms.values()))[0]["routes"])
    shape = (len(arms), len(layers))
    size = (3.4 * len(layers) + 1, 2.4 * len(arms) + 0.8)
    figure, grid = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for row, (arm, rows) in zip(grid, arms.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            for offset, (kind, color) in enumerate((("image", "tab:orange"), ("text", "tab:blue"))):
                shares = np.array([found["routes"][layer][kind] for found in rows])
                places = np.arange(shares.shape[1]) + 0.4 * offset - 0.2
                axes.bar(places, shares[0], 0.4, color=color, label=kind)
            axes.axhline(1 / shares.shape[1], color="gray", linestyle=":")
            axes.set_title(f"{arm}: {layer.removesuffix('.mlp').rpartition('language_model.')[2]}", fontsize=9)
            axes.set_xlabel("expert")
        row[0].set_ylabel("share of the tokens' choices")
    grid[0][0].legend()
    figure.suptitle(f"Which experts see image tokens and which text (seed {result['rows'][0]['seed']})")
    figure.savefig(path, dpi=110)
    plt.close(figure)
