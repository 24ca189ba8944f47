"""Tables and figure of examples/clip_moe.py."""

from pathlib import Path
from statistics import mean, stdev


ARMS = ("dense", "copies", "random batches", "CLIP-MoE")
NUM_EXPERTS = 4
TASKS = ("class", "size", "shade")
COLUMNS = {
    "image_to_text@1": "image to text, recall@1",
    "text_to_image@1": "text to image, recall@1",
    "image_to_text@5": "image to text, recall@5",
    "text_to_image@5": "text to image, recall@5",
    "class": "class (of 10)",
    "size": "size (of 2)",
    "shade": "shade (of 2)",
}


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}"


def recall(found: dict) -> float:
    """Mean of both directions' recall@1."""
    return (found["image_to_text@1"] + found["text_to_image@1"]) / 2


def summarise(rows: list[dict]) -> str:
    """Markdown tables: the arms with mean and standard deviation over seeds, differences, stages, clusters."""
    names = [arm for arm in ("base", *ARMS) if any(row["arm"] == arm for row in rows)]
    of = {arm: [row for row in rows if row["arm"] == arm] for arm in names}
    lines = ["| arm | parameters | activated | " + " | ".join(COLUMNS.values()) + " | CPU seconds |"]
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    for arm, found in of.items():
        cells = [f"{found[0]['parameters']:,}", f"{found[0]['activated']:,}"]
        cells += [spread([row["held_out"][column] for row in found]) for column in COLUMNS]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {mean(row['cpu_seconds'] for row in found):.0f} |")
    lines.append("")
    if "CLIP-MoE" in of:
        for other in names[:-1]:
            pairs = zip(of["CLIP-MoE"], of[other], strict=True)
            gaps = [recall(ours["held_out"]) - recall(theirs["held_out"]) for ours, theirs in pairs]
            lines.append(f"- recall@1 of CLIP-MoE minus {other}, by seed: {', '.join(f'{gap:+.3f}' for gap in gaps)}")
        lines += ["", "| model alone | recall@1, both ways | class | size | shade |", "|---" * 5 + "|"]
        staged = [("CLIP-MoE", number) for number in range(NUM_EXPERTS)]
        staged += [("random batches", number) for number in range(1, NUM_EXPERTS)]
        for arm, number in staged:
            found = [row["stages"][number] for row in of.get(arm, [])]
            if found:
                cells = [spread([recall(row) for row in found])]
                cells += [spread([row[what] for row in found]) for what in TASKS]
                name = f"{arm}, stage {number}" if number else "base (expert 0 of both)"
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        first = of["CLIP-MoE"][0]["stages"][1]["purity"]
        lines += ["", "| clusters (purity, and that of shuffled ones) | number | used | " + " | ".join(first) + " |"]
        lines.append("|---" * (len(first) + 3) + "|")
        for number in range(1, NUM_EXPERTS):
            found = [row["stages"][number] for row in of["CLIP-MoE"]]
            cells = [f"{mean(row['clusters'] for row in found):.0f}", f"{mean(row['used'] for row in found):.2f}"]
            for name in first:
                values = [[row["purity"][name][which] for row in found] for which in (0, 1)]
                cells.append(f"{mean(values[0]):.2f} ({mean(values[1]):.2f})")
            lines.append(f"| stage {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """One dot per seed and a bar at the mean; what the models of the stages know beside the base."""
    from matplotlib import pyplot as plt

    names = [arm for arm in ("base", *ARMS) if any(row["arm"] == arm for row in rows)]
    figure, all_axes = plt.subplots(1, 5, figsize=(19, 4), layout="constrained")
    panels = {"recall@1, mean of both ways": lambda row: recall(row["held_out"])} | {
        COLUMNS[what]: (lambda row, what=what: row["held_out"][what]) for what in TASKS
    }
    for axes, (title, value) in zip(all_axes, panels.items(), strict=False):
        for x, name in enumerate(names):
            values = [value(row) for row in rows if row["arm"] == name]
            axes.plot([x] * len(values), values, "o", alpha=0.7, color=f"C{x}")
            axes.hlines(mean(values), x - 0.3, x + 0.3, color="black")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_title(title)
    staged = [row for row in rows if row["arm"] == "CLIP-MoE"]
    axes = all_axes[-1]
    if staged:
        for what in TASKS:
            gains = [
                [row["stages"][number][what] - row["stages"][0][what] for row in staged]
                for number in range(NUM_EXPERTS)
            ]
            axes.plot(range(NUM_EXPERTS), [mean(gain) for gain in gains], "o-", label=what)
        axes.axhline(0, color="gray", linestyle=":")
        axes.set_xticks(range(NUM_EXPERTS), ["base", *(f"stage {n}" for n in range(1, NUM_EXPERTS))])
        axes.set_title("stages alone, minus the base")
        axes.legend()
    figure.suptitle("Held-out pictures; one dot per seed, bar at the mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)
