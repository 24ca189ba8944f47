"""Making a Mixture-of-Experts model forget one kind of text: one expert against the whole model (SEUF, 2411.18797).

The model is that of `domain_moe.py`: SmolLM2-135M, upcycled and trained on five kinds of text. One of them is to be
forgotten, the others are to be kept. Compared are gradient ascent on the whole model, with its routers frozen, on the
expert that attribution finds (with and without the router anchor) and on another expert of the same layer; and the
four forget losses on the expert. Each method is stopped where its balance of forgetting and utility is best.

    python examples/unlearning.py                              # three seeds; an hour on two cores, models included
    python examples/unlearning.py --seeds 0 --methods expert   # a part; finished runs are kept and not repeated
    python examples/unlearning.py --preset full                # longer runs, three learning rates to choose from

Forgetting is 0 at the start and 1 where the perplexity of the forgotten text has grown tenfold; utility is the
perplexity of the other texts at the start over that afterwards; balance is their harmonic mean. Nothing is downloaded
but the dense model.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from domain_moe import PRESETS as MODEL_PRESETS
from domain_moe import domains, load_or_train

from hf_moe.files import write_text


#: Arguments of `ExpertUnlearningConfig` by method, in the order of the table.
METHODS: dict[str, dict[str, Any]] = {
    "whole model": {"forget_loss": "ga", "trainable": "all"},
    "routers frozen": {"forget_loss": "ga", "trainable": "all_but_routers"},
    "expert, no anchor": {"forget_loss": "ga", "anchor_weight": 0.0},
    "expert": {"forget_loss": "ga"},
    "other expert": {"forget_loss": "ga"},
    "expert, GradDiff": {"forget_loss": "graddiff"},
    "expert, NPO": {"forget_loss": "npo"},
    "expert, RMU": {"forget_loss": "rmu"},
}
COLUMNS = {
    "forget_perplexity": "perplexity, forgotten",
    "retain_perplexity": "perplexity, others",
    "forgetting": "forgetting",
    "utility": "utility",
    "balance": "balance",
}


@dataclass(frozen=True)
class Settings:
    """How long and with what each method trains. Rates: of the whole model, and of one expert; the best on the first
    seed is used for the others."""

    steps: int = 6
    evaluate_every: int = 2
    batch_size: int = 3
    length: int = 64
    blocks: int = 64  # for training, per domain
    held_out_blocks: int = 4  # of the forgotten domain; a fourth as many of each other
    attribution_tokens: int = 2048
    rates_whole: tuple[float, ...] = (5e-5,)
    rates_expert: tuple[float, ...] = (2e-3,)


PRESETS = {
    "short": Settings(),
    "full": Settings(
        steps=60,
        evaluate_every=5,
        batch_size=8,
        length=128,
        blocks=512,
        held_out_blocks=24,
        attribution_tokens=100_000,
        rates_whole=(1e-5, 5e-5, 2e-4),
        rates_expert=(5e-4, 2e-3, 8e-3),
    ),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--forget", default="arithmetic", help="domain to forget")
    parser.add_argument("--models", type=Path, default=Path("domain-moe"), help="folder of the models")
    parser.add_argument("--model-seed", type=int, help="one model for all seeds, instead of one for each")
    parser.add_argument("--model-preset", choices=MODEL_PRESETS, default="short")
    parser.add_argument("--rates-whole", type=float, nargs="+", help="instead of those of the preset")
    parser.add_argument("--rates-expert", type=float, nargs="+", help="instead of those of the preset")
    parser.add_argument("--output", type=Path, default=Path("unlearning"))
    return parser.parse_args(arguments)


def rows_of(texts: dict[str, tuple[list[str], list[str]]], tokenizer: Any, forget: str, settings: Settings, seed: int):
    """Blocks of tokens: to forget, to retain, and held-out ones of both (the latter by domain)."""
    import torch

    from hf_moe.corpora import Corpus
    from hf_moe.quickstart.data import tokenize

    def as_rows(blocks):
        return [{"input_ids": block.tolist()} for block in blocks]

    generator = torch.Generator().manual_seed(seed)
    train, held_out = {}, {}
    for name, (train_texts, held_out_texts) in texts.items():
        share = settings.held_out_blocks if name == forget else max(1, settings.held_out_blocks // 4)
        corpus = Corpus(name, tuple(train_texts[:400]), tuple(held_out_texts))
        blocks, kept = tokenize(corpus, tokenizer, settings.length, share * settings.length)
        train[name] = as_rows(blocks[torch.randperm(len(blocks), generator=generator)[: settings.blocks]])
        held_out[name] = as_rows(kept)
    retain = [row for name, rows in train.items() if name != forget for row in rows]
    return train[forget], retain, held_out.pop(forget), held_out


def unlearn(model: Any, method: str, rate: float, data: tuple, settings: Settings, seed: int, scores: Any) -> dict:
    """One run; what it measured after every few steps, the best balance among them, and what it cost."""
    import torch

    from hf_moe.trainers import ExpertUnlearningConfig, ExpertUnlearningTrainer

    forget, retain, eval_forget, eval_retain = data
    options = dict(METHODS[method])
    if method == "other expert":
        options["target_experts"] = other_expert(scores, seed)
    with tempfile.TemporaryDirectory(prefix="hf-moe-") as scratch:
        args = ExpertUnlearningConfig(
            scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=2 * settings.batch_size,
            attribution_tokens=settings.attribution_tokens,
            learning_rate=rate,
            eval_strategy="steps",
            eval_steps=settings.evaluate_every,
            save_strategy="no",
            logging_steps=settings.evaluate_every,
            report_to=[],
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available() or torch.backends.mkldnn.is_available(),
            dataloader_pin_memory=False,
            **options,
        )
        trainer = ExpertUnlearningTrainer(
            model, args, forget, retain, eval_forget, eval_retain, scores=scores, processing_class=None
        )
        start = trainer.measure_start()
        args.forget_loss_target = start["forget"] + math.log(10.0)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    log = [entry for entry in trainer.state.log_history if "eval_balance" in entry]
    curve = [{name: entry[f"eval_{name}"] for name in (*COLUMNS, "forget_loss", "retain_loss")} for entry in log]
    for point, entry in zip(curve, log, strict=True):
        point["step"] = entry["step"]
    best = max(curve, key=lambda point: point["balance"])
    return {
        "method": method,
        "seed": seed,
        "rate": rate,
        "targets": trainer.targets,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "start": {name: math.exp(value) for name, value in start.items()},
        "curve": curve,
        "seconds": seconds,
        **{name: best[name] for name in (*COLUMNS, "step")},
    }


def other_expert(scores: Any, seed: int) -> dict[str, list[int]]:
    """An expert of the layer of the best one, drawn among the rest."""
    import random

    ((layer, expert, _),) = scores.best(1)
    rest = [i for i in range(len(scores.layers[layer])) if i != expert]
    return {layer: [random.Random(seed).choice(rest)]}


def run(
    args: argparse.Namespace,
    settings: Settings,
    source: tuple[Any, Any] | None = None,
    texts: dict | None = None,
    model_settings: Any = None,
) -> list[dict]:
    """All runs, each kept in a file of its own as soon as it is done."""
    from hf_moe import ExpertScores, attribute_experts

    rows = []
    best_rate: dict[str, float] = {}
    for seed in args.seeds:
        common = {"source": source, "texts": texts, "settings": model_settings}
        model_seed = seed if args.model_seed is None else args.model_seed
        loaded = load_or_train(args.models, args.model_preset, model_seed, **common)
        tokenizer = loaded[1]
        data = rows_of(texts or domains(model_seed), tokenizer, args.forget, settings, seed)
        path = args.output / f"scores-{args.forget}-seed{seed}.json"
        if not path.exists():
            attribute_experts(loaded[0], data[0], settings.attribution_tokens).to_json(path)
        scores = ExpertScores.from_json(path)
        for method in args.methods:
            is_whole = METHODS[method].get("trainable", "expert") != "expert"
            rates = settings.rates_whole if is_whole else settings.rates_expert
            if method in best_rate:
                rates = (best_rate[method],)
            tried = []
            for rate in rates:
                path = (
                    args.output
                    / "runs"
                    / f"{args.forget}-{method.replace(', ', '-').replace(' ', '-')}-{seed}-{rate:g}.json"
                )
                if not path.exists():
                    model, _, _ = load_or_train(args.models, args.model_preset, model_seed, **common)
                    result = unlearn(model, method, rate, data, settings, seed, scores)
                    write_text(path, json.dumps(result, indent=1))
                tried.append(json.loads(path.read_text(encoding="utf-8")))
                print(one_line(tried[-1]), flush=True)
            best = max(tried, key=lambda result: result["balance"])
            best_rate.setdefault(method, best["rate"])
            rows.append(best)
    return rows


def one_line(row: dict) -> str:
    numbers = ", ".join(f"{label} {row[name]:.3g}" for name, label in COLUMNS.items())
    run = f"seed {row['seed']}, {row['method']}, rate {row['rate']:g}"
    return f"{run}: {numbers} (step {row['step']}, {row['seconds']:.0f} s)"


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3g} ± {deviation:.2g}"


def summarise(rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds as a Markdown table, and whether the paper's ordering appears."""
    start = {name: [row["start"][name] for row in rows] for name in ("forget", "retain")}
    lines = [
        "| method | trained parameters | " + " | ".join(COLUMNS.values()) + " | rate |",
        "|---" * (len(COLUMNS) + 3) + "|",
        f"| start | | {spread(start['forget'])} | {spread(start['retain'])} | 0 | 1 | 0 | |",
    ]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            cells = [spread([row[column] for row in own]) for column in COLUMNS]
            lines.append(f"| {method} | {own[0]['trained_parameters']:,} | {' | '.join(cells)} | {own[0]['rate']:g} |")
    return "\n".join([*lines, "", *orderings(rows)]) + "\n"


#: Better, worse, and what the paper says.
CLAIMS = (
    ("expert", "whole model", "one expert keeps more than the whole model"),
    ("expert", "routers frozen", "one expert keeps more than the whole model with frozen routers"),
    ("expert", "expert, no anchor", "the anchor helps"),
    ("expert", "other expert", "the attributed expert is better than another one"),
)


def orderings(rows: list[dict]) -> list[str]:
    """Whether each claim of the paper appears, seed by seed."""
    balance = {(row["method"], row["seed"]): row["balance"] for row in rows}
    said = []
    for better, worse, claim in CLAIMS:
        pairs = [(balance[better, s], balance[worse, s]) for m, s in balance if m == better and (worse, s) in balance]
        if pairs:
            wins = sum(a > b for a, b in pairs)
            verdict = "appears" if wins == len(pairs) else "does not appear" if wins == 0 else "is mixed"
            differences = ", ".join(f"{a - b:+.3f}" for a, b in pairs)
            said.append(f"- {claim}: {verdict} ({wins} of {len(pairs)} seeds; balance {differences}).")
    return said


def draw(rows: list[dict], path: Path) -> None:
    """Forgetting against utility along every run, and the best balances."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    colours = dict(zip(methods, plt.get_cmap("tab10").colors, strict=False))
    for row in rows:
        points = [(0.0, 1.0)] + [(point["forgetting"], point["utility"]) for point in row["curve"]]
        is_first = row is next(other for other in rows if other["method"] == row["method"])
        label = row["method"] if is_first else None
        left.plot(*zip(*points, strict=True), marker=".", color=colours[row["method"]], alpha=0.7, label=label)
    left.set(xlabel="forgetting (1: perplexity ten times that at the start)", ylabel="utility")
    left.legend(fontsize=8)
    for position, method in enumerate(methods):
        values = [row["balance"] for row in rows if row["method"] == method]
        right.plot(values, [position] * len(values), "o", color=colours[method], alpha=0.7)
        right.plot(statistics.mean(values), position, "|", color="black", markersize=16)
    right.set(xlabel="best balance of forgetting and utility (bar: mean)", yticks=range(len(methods)))
    right.grid(axis="x", alpha=0.3)
    right.set_yticklabels(methods)
    right.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None, **toy: Any) -> list[dict]:
    """Runs, and writes the table, the figures and the drawing.

    Args:
        arguments (`list[str]`, *optional*): Of the command line.
        **toy: `settings`, `source`, `texts` and `model_settings` of a smaller model.

    Returns:
        `list[dict]`: One per method and seed.
    """
    from dataclasses import replace

    args = parse_arguments(arguments)
    settings = toy.pop("settings", None) or PRESETS[args.preset]
    for name in ("rates_whole", "rates_expert"):
        if getattr(args, name):
            settings = replace(settings, **{name: tuple(getattr(args, name))})
    rows = run(args, settings, **toy)
    table = summarise(rows)
    print(table)
    write_text(args.output / "table.md", table)
    facts = {"forget": args.forget, "settings": asdict(settings), "rows": rows}
    write_text(args.output / "unlearning.json", json.dumps(facts, indent=1) + "\n")
    draw(rows, args.output / "unlearning.png")
    return rows


if __name__ == "__main__":
    main()
