"""Self-contrast decoding on arithmetic word problems (SCMoE, https://huggingface.co/papers/2405.14507).

The model is that of `domain_moe.py`: SmolLM2-135M, four of its layers upcycled to 8 experts, trained on five kinds of
text, one of them word problems with written reasoning. Generated problems whose equations were never trained on are
answered with the same model in different ways, all greedy:

* greedy decoding, and the same with one, three or four experts per token instead of two;
* self-contrast, with several strengths and weak routings;
* contrastive decoding against an amateur, the dense model it all started from: the same formula, another weak stream.

    python examples/self_contrast.py --seeds 0                 # short: 2 sets of 50 problems, an hour on a busy CPU
    python examples/self_contrast.py --preset full --seeds 0 1 2
    python examples/self_contrast.py --methods greedy "rank 2, beta 0.5"

Finished runs are kept in the output folder and not repeated. Accuracy is the share of exact answers, its spread that
over sets and training seeds; the difference from greedy is taken set by set. Latency is the median over problems,
answered one by one with all methods taking turns, of the time divided by greedy decoding's (CPU time with one thread,
wall time otherwise). No setting is chosen by looking at the problems: every one is shown.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from domain_moe import Problem, accuracy, load_or_train, solve, spread, word_problems
from transformers import LogitsProcessor, StoppingCriteria

import hf_moe
from hf_moe.files import write_text
from hf_moe.generation import contrast_logits


class Preset(NamedTuple):
    """Sets of problems per training seed, problems per set (half of them with two steps), problems that are timed."""

    sets: int
    problems: int
    timed: int


PRESETS = {"short": Preset(2, 50, 2), "full": Preset(4, 200, 8)}
MAX_NEW_TOKENS = 40


class Method(NamedTuple):
    """How to decode.

    Args:
        decoder (`SelfContrast`, *optional*): For `custom_generate`.
        beta (`float`, *optional*): Strength of the contrast with the dense amateur.
        experts (`int`, *optional*): Experts per token, if not the model's own number.
    """

    decoder: Any = None
    beta: float | None = None
    experts: int | None = None

    def routing(self, model: Any) -> AbstractContextManager:
        """The context to generate in."""
        return nullcontext() if self.experts is None else hf_moe.routing_override(model, top_m=self.experts)

    def arguments(self, amateur: Any, pad_token_id: int) -> dict[str, Any]:
        """What `generate` is given."""
        if self.beta is not None:
            return {"logits_processor": [Amateur(amateur, self.beta, pad_token_id)]}
        return {} if self.decoder is None else {"custom_generate": self.decoder}


METHODS = {
    "greedy": Method(),
    "1 expert": Method(experts=1),
    "3 experts": Method(experts=3),
    "4 experts": Method(experts=4),
    "rank 2, beta 0.1": Method(hf_moe.SelfContrast(beta=0.1)),
    "rank 2, beta 0.5": Method(hf_moe.SelfContrast(beta=0.5)),
    "rank 2, beta 0.9": Method(hf_moe.SelfContrast(beta=0.9)),
    "rank 3, beta 0.5": Method(hf_moe.SelfContrast(beta=0.5, weak="rank:3")),
    "random, beta 0.5": Method(hf_moe.SelfContrast(beta=0.5, weak="random:1", seed=0)),
    "dense amateur, beta 0.5": Method(beta=0.5),
}


class Amateur(LogitsProcessor):
    """Contrastive decoding (https://huggingface.co/papers/2210.15097) with the scores of self-contrast decoding."""

    def __init__(self, model: Any, beta: float, pad_token_id: int):
        self.model, self.beta, self.pad_token_id = model, beta, pad_token_id
        self.cache: Any = None
        self.mask: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids if self.cache is None else input_ids[:, -1:]
        if self.cache is None:
            self.mask = ((input_ids != self.pad_token_id).cumsum(-1) > 0).long()  # padded on the left
        else:
            self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=-1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = self.model(
            new, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        self.cache = output.past_key_values
        return contrast_logits(scores, output.logits[:, -1], self.beta)


class Answered(StoppingCriteria):
    """Ends a text after the line with its answer."""

    def __init__(self, tokenizer: Any, prompt_length: int):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        ended = ["\n" in text.partition("Answer:")[2] for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def answer(method: Method, model: Any, amateur: Any, tokenizer: Any, problems: list[Problem], batch: int) -> list[str]:
    """[`domain_moe.solve`] with a method, batch by batch: the amateur's cache and the stopping belong to one batch."""
    texts = []
    with method.routing(model):
        for start in range(0, len(problems), batch):
            part = problems[start : start + batch]
            length = tokenizer([problem.prompt for problem in part], padding=True, return_tensors="pt").input_ids
            texts += solve(
                model,
                tokenizer,
                part,
                batch,
                max_new_tokens=MAX_NEW_TOKENS,
                stopping_criteria=[Answered(tokenizer, length.shape[1])],
                **method.arguments(amateur, tokenizer.pad_token_id),
            )
    return texts


def latencies(names: list[str], model: Any, amateur: Any, tokenizer: Any, problems: list[Problem]) -> list[dict]:
    """Seconds per method, one row per problem; the methods take turns and all write the same number of tokens."""
    rows: list[dict[str, float]] = []
    for place, problem in enumerate(problems):
        inputs = tokenizer(problem.prompt, return_tensors="pt")
        shift = place % len(names)
        rows.append({})
        for name in names[shift:] + names[:shift]:
            method = METHODS[name]
            with method.routing(model), torch.no_grad():
                start = clock()
                model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=MAX_NEW_TOKENS,
                    min_new_tokens=MAX_NEW_TOKENS,
                    pad_token_id=tokenizer.pad_token_id,
                    **method.arguments(amateur, -1),
                )
                rows[-1][name] = clock() - start
    return rows


def clock() -> float:
    """CPU time of this thread where only one computes, else wall time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def cached(path: Path, compute: Callable[[], Any]) -> Any:
    """What `compute` returned the first time."""
    if not path.exists():
        write_text(path, json.dumps(compute(), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def run_seed(args: argparse.Namespace, seed: int, overrides: dict[str, Any], amateur: Any, dtype: str) -> dict:
    """All methods on all sets with the model of one training seed."""
    model, tokenizer, info = load_or_train(args.models, args.model_preset, seed, dtype=dtype, **overrides)
    preset = Preset(
        *(
            own or default
            for own, default in zip((args.sets, args.problems, args.timed), PRESETS[args.preset], strict=True)
        )
    )
    folder = args.output / f"seed{seed}"
    found: dict[str, list[dict]] = {name: [] for name in args.methods}
    for set_ in range(preset.sets):
        # not the problems that domain_moe.py measures, and others for every training seed
        drawn = 1000 + 100 * seed + set_
        problems = [p for steps in (1, 2) for p in word_problems(drawn, preset.problems // 2, "test", steps)]
        for name in args.methods:
            path = folder / f"{name.replace(' ', '-').replace(',', '')}-{drawn}-{preset.problems}.json"

            def compute(name=name, problems=problems) -> dict:
                texts = answer(METHODS[name], model, amateur, tokenizer, problems, args.batch_size)
                half = len(problems) // 2
                return {
                    "accuracy": accuracy(texts, problems),
                    "one_step": accuracy(texts[:half], problems[:half]),
                    "two_steps": accuracy(texts[half:], problems[half:]),
                    "sample": problems[-1].prompt + texts[-1],
                }

            found[name].append(cached(path, compute))
    timed = word_problems(3000 + seed, preset.timed, "test")
    names = list(dict.fromkeys(["greedy", *args.methods]))
    seconds = cached(
        folder / f"seconds-{len(timed)}-{len(names)}.json",
        lambda: latencies(names, model, amateur, tokenizer, timed),
    )
    return {"seed": seed, "sets": found, "seconds": seconds, "trained": info["after"]["accuracy"]}


def summarise(runs: list[dict], names: list[str]) -> list[dict]:
    """One row per method over all sets of all seeds."""
    rows = []
    pooled = {name: [one for run in runs for one in run["sets"][name]] for name in names}
    for name in names:
        differences = [
            one["accuracy"] - greedy["accuracy"] for one, greedy in zip(pooled[name], pooled["greedy"], strict=True)
        ]
        ratios = [row[name] / row["greedy"] for run in runs for row in run["seconds"]]
        rows.append(
            {
                "method": name,
                **{key: [one[key] for one in pooled[name]] for key in ("accuracy", "one_step", "two_steps")},
                "difference": differences,
                "latency": statistics.median(ratios),
            }
        )
    return rows


def as_table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| method | accuracy | one step | two steps | minus greedy | latency / greedy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [spread(row[key]) for key in ("accuracy", "one_step", "two_steps", "difference")]
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {row['latency']:.2f} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy and latency per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 0.42 * len(rows) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    names = [row["method"] for row in rows]
    means = [statistics.mean(row["accuracy"]) for row in rows]
    errors = [statistics.stdev(row["accuracy"]) if len(row["accuracy"]) > 1 else 0 for row in rows]
    colours = ["tab:blue" if "rank" in name or "random" in name else "silver" for name in names]
    left.barh(names, means, color=colours)
    left.errorbar(means, names, xerr=errors, fmt="none", ecolor="black", capsize=3)
    for position, row in enumerate(rows):
        left.plot(row["accuracy"], [position] * len(row["accuracy"]), "k.", markersize=4)
    left.axvline(means[names.index("greedy")], color="black", linestyle=":", linewidth=1)
    left.set(xlabel="exact answers (bar: mean, line: standard deviation, dots: sets)", xlim=(0, 1))
    left.invert_yaxis()
    right.barh(names, [row["latency"] for row in rows], color=colours)
    right.axvline(1, color="black", linestyle=":", linewidth=1)
    right.set(xlabel="latency / greedy, batch 1")
    figure.suptitle("Arithmetic word problems; self-contrast in blue")
    FigureCanvasAgg(figure).print_png(path)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds (default: 0)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--sets", type=int, help="sets of problems per training seed, instead of the preset's")
    parser.add_argument("--problems", type=int, help="problems per set")
    parser.add_argument("--timed", type=int, help="problems that are timed")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--models", type=Path, default=Path("domain-moe"), help="where domain_moe.py keeps its models")
    parser.add_argument("--model-preset", default="short", help="preset of domain_moe.py (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=Path("self-contrast"))
    args = parser.parse_args(arguments)
    args.methods = list(dict.fromkeys(["greedy", *args.methods]))
    return args


def main(arguments: list[str] | None = None, **overrides: Any) -> list[dict]:
    """`overrides` go to `domain_moe.load_or_train`; tests pass a tiny model with them."""
    args = parse_arguments(arguments)
    dense = overrides["source"][0] if "source" in overrides else hf_moe.load_dense("auto")[0]
    amateur = dense.to(getattr(torch, args.dtype)).eval()
    runs = [run_seed(args, seed, overrides, amateur, args.dtype) for seed in args.seeds]
    rows = summarise(runs, args.methods)
    table = as_table(rows)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_text(
        args.output / "results.json", json.dumps({"settings": settings, "rows": rows, "runs": runs}, indent=1) + "\n"
    )
    write_text(args.output / "results.md", table)
    draw(rows, args.output / "results.png")
    print(table)
    return rows


if __name__ == "__main__":
    main()
