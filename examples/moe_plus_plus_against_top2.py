"""MoE++ against a plain top-2 MoE: same dense model, data, budget and feed-forward experts, several seeds.

Both are upcycled from the same weights and fine-tuned on the same batches; then their held-out perplexity, the
feed-forward experts a token uses and the training time are compared. A table is printed and written as Markdown and
JSON, and drawn.

    python examples/moe_plus_plus_against_top2.py                        # SmolLM2-135M, 3 seeds; about half an hour
    python examples/moe_plus_plus_against_top2.py --model DIR --steps 2  # any Llama-like model, quickly

Text: the Python reference documentation that comes with Python, or `--text FILE`.
"""

import argparse
import json
import statistics
from pathlib import Path

from hf_moe.files import write_text


METHODS = {"top-2": "moe_llama", "MoE++": "moe_plus_plus"}
COLUMNS = {
    "perplexity": "held-out perplexity",
    "ffn_experts": "feed-forward experts per token",
    "seconds": "training seconds",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="auto", help="folder or Hub id of a Llama-like model")
    parser.add_argument("--text", help="text file to train on; the Python reference by default")
    parser.add_argument("--experts", type=int, default=8, help="feed-forward experts per MoE layer")
    parser.add_argument("--layers", default="every:10", help="layers to upcycle, as in `hf_moe.upcycle`")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("moe-plus-plus-against-top2"))
    return parser.parse_args(arguments)


def run_one(method: str, seed: int, dense, train, held_out, args: argparse.Namespace) -> dict:
    """Upcycles, trains and measures one model."""
    import hf_moe
    from hf_moe.quickstart.data import held_out_perplexity
    from hf_moe.quickstart.training import fine_tune

    moe, _ = hf_moe.upcycle(
        dense,
        num_experts=args.experts,
        top_k=2,
        layers=args.layers,
        target=METHODS[method],
        calibration=[{"input_ids": block[None]} for block in train[:4]],
        check=False,
        seed=seed,
    )
    before = held_out_perplexity(moe, held_out, f"{method} seed {seed}, before")
    trained = fine_tune(
        moe, train, steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=seed
    )
    after = held_out_perplexity(moe, held_out, f"{method} seed {seed}, after")
    return {
        "method": method,
        "seed": seed,
        "before": before,
        "perplexity": after,
        "ffn_experts": feed_forward_experts(moe, held_out),
        "seconds": trained["seconds"],
        "parameters": moe.num_parameters(),
    }


def feed_forward_experts(moe, blocks) -> float:
    """Mean number of feed-forward experts a token uses in a MoE layer."""
    import torch

    used = []
    with torch.no_grad():
        for block in blocks[:8]:
            output = moe(block[None].to(moe.device), output_router_logits=True)
            used += [(index < moe.config.num_experts).sum(-1).float().mean() for index in output.router_indices]
    return float(torch.stack(used).mean())


def summarise(rows: list[dict], dense: float) -> str:
    """Mean and standard deviation over the seeds, as a Markdown table."""
    lines = [
        "| method | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        f"| dense, not trained | {dense:.3f} | 1 | |",
    ]
    for method in METHODS:
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in rows if row["method"] == method]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    paired = [
        plus["perplexity"] - plain["perplexity"]
        for plus in rows
        for plain in rows
        if (plus["method"], plain["method"]) == ("MoE++", "top-2") and plus["seed"] == plain["seed"]
    ]
    wins = sum(difference < 0 for difference in paired)
    lines += [
        "",
        f"Perplexity of MoE++ minus that of top-2, seed by seed: {', '.join(f'{d:+.3f}' for d in paired)}; "
        f"MoE++ is lower with {wins} of {len(paired)} seeds.",
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], dense: float, path: Path) -> None:
    """One dot per seed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(4 * len(COLUMNS), 3.4), layout="constrained")
    for axis, (column, label) in zip(axes, COLUMNS.items(), strict=True):
        for x, method in enumerate(METHODS):
            values = [row[column] for row in rows if row["method"] == method]
            axis.plot([x] * len(values), values, "o", alpha=0.7)
            axis.hlines(statistics.mean(values), x - 0.2, x + 0.2, color="black")
        axis.set(title=label, xticks=range(len(METHODS)), xticklabels=list(METHODS), xlim=(-0.6, len(METHODS) - 0.4))
    axes[1].set_ylim(0, 2.1)  # from none to both slots, or rounding would fill the axis
    axes[0].axhline(dense, color="gray", linestyle=":", label="dense, not trained")
    axes[0].legend()
    figure.suptitle("One dot per seed, bar at the mean")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse_arguments(arguments)
    from hf_moe.corpora import load_corpus, load_text_file
    from hf_moe.quickstart.data import held_out_perplexity, tokenize
    from hf_moe.weights import load_dense

    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_dense(args.model)
    corpus = load_text_file(args.text) if args.text else load_corpus("reference")
    train, held_out = tokenize(corpus, tokenizer, args.sequence_length, args.held_out_tokens)
    dense = held_out_perplexity(model, held_out, "dense")
    rows = []
    for seed in args.seeds:
        # Alternating, so that a busy machine slows both alike.
        for method in METHODS:
            rows.append(run_one(method, seed, model, train, held_out, args))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"settings": settings, "dense_perplexity": dense, "rows": rows}
    write_text(args.output / "results.json", json.dumps(result, indent=2) + "\n")
    table = summarise(rows, dense)
    write_text(args.output / "results.md", table)
    draw(rows, dense, args.output / "results.png")
    print(table)
    return rows


if __name__ == "__main__":
    main()
