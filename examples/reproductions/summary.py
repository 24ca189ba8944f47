"""Means with confidence intervals, seed-by-seed differences to the baseline, the table and the plot."""

import math
import statistics
from pathlib import Path
from typing import Any

from harness import Reproduction


__all__ = ["draw", "half_width", "summarise", "verdicts"]

#: Two-sided 95 % points of Student's t by degrees of freedom; the last one for all above.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
NORMAL = 1.96


def half_width(values: list[float]) -> float:
    """Half of the 95 % confidence interval of the mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return STUDENT.get(len(values) - 1, NORMAL) * statistics.stdev(values) / math.sqrt(len(values))


def verdicts(reproductions: list[Reproduction], runs: list[dict]) -> list[dict[str, Any]]:
    """One row per arm.

    Args:
        reproductions (`list[Reproduction]`): What was run.
        runs (`list[dict]`): As `run.run_one` returns them.

    Returns:
        `list[dict]`: Means and half-widths of all figures, the difference to the baseline's metric seed by seed, and
        what it says: "better" or "worse" where the interval of the difference leaves out 0, else "no difference".
    """
    rows = []
    for reproduction in reproductions:
        by_arm = {
            arm: {run["seed"]: run for run in runs if (run["reproduction"], run["arm"]) == (reproduction.name, arm)}
            for arm in reproduction.arms
        }
        base = by_arm[reproduction.baseline]
        for arm, by_seed in by_arm.items():
            figures: dict[str, list[float]] = {}
            for run in by_seed.values():
                for key, value in run["figures"].items():
                    figures.setdefault(key, []).append(value)
            metric = reproduction.metric
            pairs = [(by_seed[s]["figures"][metric], base[s]["figures"][metric]) for s in by_seed if s in base]
            differences = [one - other for one, other in pairs]
            row = {
                "reproduction": reproduction.name,
                "arm": arm,
                "runs": len(by_seed),
                "figures": {key: [statistics.mean(v), half_width(v)] for key, v in figures.items()},
                "seconds": statistics.mean(run["seconds"] for run in by_seed.values()),
            }
            if reproduction.target is not None:
                row["verdict"] = f"theory {reproduction.target:g}"
            elif arm == reproduction.baseline:
                row["verdict"] = "baseline"
            else:
                mean, width = statistics.mean(differences), half_width(differences)
                row["difference"] = [mean, width]
                better = (mean < 0) == reproduction.lower_is_better
                row["verdict"] = "no difference" if abs(mean) <= width else "better" if better else "worse"
            rows.append(row)
    return rows


def summarise(reproductions: list[Reproduction], rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one table per reproduction with its claim."""
    parts = []
    for reproduction in reproductions:
        own = [row for row in rows if row["reproduction"] == reproduction.name]
        others = list(dict.fromkeys(key for row in own for key in row["figures"] if key != reproduction.metric))
        papers = ", ".join(reproduction.papers)
        head = [f"{reproduction.metric} (95 %)", "difference (95 %)", "verdict", *others, "seconds"]
        lines = [
            f"## {reproduction.name} ({papers})",
            "",
            reproduction.claim,
            "",
            "| arm | " + " | ".join(head) + " |",
            "|---" * (len(head) + 1) + "|",
        ]
        for row in own:
            cells = [
                interval(row["figures"].get(reproduction.metric)),
                interval(row.get("difference"), sign=True),
                row["verdict"],
                *(interval(row["figures"].get(key)) for key in others),
                f"{row['seconds']:.0f}",
            ]
            lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def interval(value: list[float] | None, sign: bool = False) -> str:
    """`mean ± half-width`, or nothing."""
    if value is None:
        return ""
    mean, width = value
    shown = f"{mean:+.4f}" if sign else f"{mean:.4f}" if abs(mean) < 100 else f"{mean:.5g}"
    return shown if math.isinf(width) else f"{shown} ± {width:.4f}"


def draw(reproductions: list[Reproduction], runs: list[dict], path: Path) -> None:
    """One panel per reproduction, one dot per seed, the mean as a bar."""
    from matplotlib import pyplot as plt

    columns = min(3, len(reproductions))
    lines = math.ceil(len(reproductions) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(reproductions) :]:
        axis.set_visible(False)
    for axis, reproduction in zip(axes.flat, reproductions, strict=False):
        arms = list(reproduction.arms)
        for y, arm in enumerate(arms):
            values = [
                run["figures"][reproduction.metric]
                for run in runs
                if (run["reproduction"], run["arm"]) == (reproduction.name, arm)
            ]
            axis.plot(values, [y] * len(values), "o", alpha=0.7, color="tab:blue")
            axis.vlines(statistics.mean(values), y - 0.3, y + 0.3, color="black")
        if reproduction.target is not None:
            axis.axvline(reproduction.target, color="gray", linestyle=":", label="theory")
            axis.legend()
        axis.set(title=reproduction.name, xlabel=reproduction.metric, yticks=range(len(arms)), yticklabels=arms)
        axis.invert_yaxis()
    figure.suptitle("One dot per seed, bar at the mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)
