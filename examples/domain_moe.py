"""A small MoE whose experts differ: SmolLM2-135M upcycled and briefly trained on several kinds of text.

Other examples (`self_contrast.py`, `unlearning.py`) need a Mixture-of-Experts that is real but fits a laptop. This one
makes it once and keeps it: `load_or_train(folder)` gives the model, its tokenizer and what was measured.

    python examples/domain_moe.py                          # one seed, about six minutes on two cores
    python examples/domain_moe.py --seeds 0 1 2 --output out
    python examples/domain_moe.py --preset full            # four times the training

Domains: source code and documentation strings of the Python standard library, licences and project descriptions of the
packages hf-moe depends on (see `hf_moe.corpora`; nothing is downloaded), and arithmetic word problems that are
generated here with their reasoning and one exact answer.
"""

import argparse
import json
import random
import re
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_moe.files import new_folder, write_text


ARITHMETIC = "arithmetic"
TEXT_DOMAINS = ("code", "docstrings", "licences", "readmes")
#: One of this many arithmetic problems is never trained on.
TEST_EVERY = 5


@dataclass(frozen=True)
class Settings:
    """What `load_or_train` does. Trained are all layers from `train_from` on; those below stay the dense model's."""

    num_experts: int = 8
    top_k: int = 2
    layers: tuple[int, ...] = (20, 23, 26, 29)
    train_from: int = 18
    redrawn: float = 0.125  # share of every expert's channels that starts anew (Drop-Upcycling)
    router_norm: float = 1.0
    aux_loss: float = 1e-3
    steps: int = 80
    batch_size: int = 4
    length: int = 256
    learning_rate: float = 5e-4
    arithmetic_share: float = 0.4
    held_out_blocks: int = 8
    problems: int = 100


PRESETS = {"short": Settings(), "full": Settings(steps=400, held_out_blocks=24, problems=400)}


class Problem(NamedTuple):
    """An arithmetic word problem.

    Args:
        question (`str`): The text of the problem.
        reasoning (`str`): One equation per step.
        answer (`int`): The only right answer.
        steps (`int`): 1 or 2.
    """

    question: str
    reasoning: str
    answer: int
    steps: int

    @property
    def prompt(self) -> str:
        """What a model is given."""
        return f"Question: {self.question}\nReasoning:"

    @property
    def text(self) -> str:
        """What a model is trained on."""
        return f"{self.prompt} {self.reasoning}\nAnswer: {self.answer}\n"


NAMES = (
    "Ada Ben Carla David Emma Felix Grace Hugo Iris Jonas Kira Leo Mona Nils Olga Paul Rosa Sam Tara Victor".split()
)
THINGS = "apples books coins stamps pencils shells marbles cookies cards buttons oranges stones tickets beads".split()
BOXES = "boxes bags baskets drawers jars".split()


def word_problems(seed: int, n: int, split: str = "train", steps: int | None = None) -> list[Problem]:
    """Draws different word problems with worked reasoning. No equations of one split occur in the other.

    Args:
        seed (`int`): Seed of the draw.
        n (`int`): How many.
        split (`str`, defaults to `"train"`): `"train"` or `"test"`; decided by the equations, so that neither another
            name nor another seed carries a problem across.
        steps (`int`, *optional*): Only problems of 1 or of 2 steps; both alternating by default.

    Returns:
        `list[Problem]`
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    generator = random.Random(f"{seed} {split}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        wanted = steps or 1 + len(found) % 2
        form = generator.choice(ONE_STEP if wanted == 1 else TWO_STEPS)
        one, other = generator.sample(NAMES, 2)
        words = (one, other, generator.choice(THINGS), generator.choice(BOXES))
        question, reasoning, answer = form(*words, *draw_numbers(generator))
        # Not the question decides: the same equations with another name would be a known problem.
        if (zlib.crc32(reasoning.encode()) % TEST_EVERY == 0) == (split == "test"):
            found[question] = Problem(question, reasoning, answer, wanted)
    return list(found.values())


def draw_numbers(generator: random.Random) -> tuple[int, int, int]:
    """a > b, both small, and a factor c."""
    b = generator.randint(2, 19)
    return b + generator.randint(1, 30), b, generator.randint(2, 5)


def gets(one, other, thing, box, a, b, c):
    return (
        f"{one} has {a} {thing}. {other} gives {one} {b} more. How many {thing} does {one} have now?",
        (f"{a} + {b} = {a + b}."),
        a + b,
    )


def loses(one, other, thing, box, a, b, c):
    return (
        f"{one} has {a} {thing} and gives {b} of them to {other}. How many {thing} are left?",
        (f"{a} - {b} = {a - b}."),
        a - b,
    )


def packs(one, other, thing, box, a, b, c):
    return (
        f"{one} has {c} {box} with {b} {thing} in each. How many {thing} are there in all?",
        (f"{c} * {b} = {c * b}."),
        c * b,
    )


def gets_and_loses(one, other, thing, box, a, b, c):
    return (
        f"{one} has {a} {thing}, finds {b} more and then loses {c}. How many {thing} does {one} have now?",
        f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.",
        a + b - c,
    )


def packs_and_gets(one, other, thing, box, a, b, c):
    return (
        f"{one} has {c} {box} with {b} {thing} in each. {other} brings {a} more. How many {thing} are there in all?",
        f"{c} * {b} = {c * b}. {c * b} + {a} = {c * b + a}.",
        c * b + a,
    )


def compares(one, other, thing, box, a, b, c):
    return (
        f"{one} has {a} {thing}. {other} has {b} fewer than {one}. How many {thing} do they have together?",
        f"{a} - {b} = {a - b}. {a} + {a - b} = {2 * a - b}.",
        2 * a - b,
    )


ONE_STEP: tuple[Callable, ...] = (gets, loses, packs)
TWO_STEPS: tuple[Callable, ...] = (gets_and_loses, packs_and_gets, compares)


def domains(seed: int = 0) -> dict[str, tuple[list[str], list[str]]]:
    """The text that [`load_or_train`] trains on and evaluates with.

    Args:
        seed (`int`, defaults to 0): Seed of the arithmetic problems; the other texts are the same for every seed.

    Returns:
        `dict`: Domain name to (training texts, held-out texts).
    """
    from hf_moe.corpora import load_corpus

    found = {}
    for name in TEXT_DOMAINS:
        corpus = load_corpus(name, max_characters=1_500_000)
        found[name] = (list(corpus.train), list(corpus.held_out))
    problems = {split: word_problems(seed, n, split) for split, n in (("train", 4000), ("test", 400))}
    found[ARITHMETIC] = tuple([problem.text for problem in problems[split]] for split in ("train", "test"))
    return found


def provenance() -> dict[str, str]:
    """Where the text of each domain comes from."""
    import platform

    from hf_moe.corpora import DOMAINS

    texts = {name: f"{DOMAINS[name]} (Python {platform.python_version()})" for name in TEXT_DOMAINS}
    return {**texts, ARITHMETIC: "generated by word_problems() in examples/domain_moe.py"}


def answer_in(text: str) -> int | None:
    """The number on the first line that begins with `Answer:`."""
    found = re.search(r"Answer:\s*(-?\d+)", text)
    return int(found.group(1)) if found else None


def solve(
    model: Any, tokenizer: Any, problems: Iterable[Problem], batch_size: int = 25, **generate_arguments: Any
) -> list[str]:
    """Lets a model continue the prompts of problems; greedily unless told otherwise.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer: Its tokenizer.
        problems (`Iterable[Problem]`): What to solve.
        batch_size (`int`, defaults to 25): Problems at a time, padded on the left.
        **generate_arguments: For `model.generate`, e.g. `custom_generate=...`.

    Returns:
        `list[str]`: What was written after each prompt.
    """
    import torch

    prompts, texts = [problem.prompt for problem in problems], []
    generate_arguments = {"do_sample": False, "max_new_tokens": 40, **generate_arguments}
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            written = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                pad_token_id=tokenizer.pad_token_id,
                **generate_arguments,
            )
        texts += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(texts: list[str], problems: Iterable[Problem]) -> float:
    """Share of texts from [`solve`] whose answer is right."""
    right = [answer_in(text) == problem.answer for text, problem in zip(texts, problems, strict=True)]
    return sum(right) / len(right)


def token_blocks(texts: dict[str, tuple[list[str], list[str]]], tokenizer: Any, settings: Settings, seed: int):
    """Training blocks of all domains in a random order, and held-out blocks per domain; all `(M, S)`."""
    import torch

    from hf_moe.corpora import Corpus
    from hf_moe.quickstart.data import tokenize

    generator = torch.Generator().manual_seed(seed)
    needed, shares = settings.steps * settings.batch_size, {}
    for name in texts:
        rest = 1 - settings.arithmetic_share if ARITHMETIC in texts else 1
        shares[name] = settings.arithmetic_share if name == ARITHMETIC else rest / len(texts.keys() - {ARITHMETIC})
    train, held_out = [], {}
    for name, (train_texts, held_out_texts) in texts.items():
        corpus = Corpus(name, tuple(train_texts), tuple(held_out_texts))
        blocks, held_out[name] = tokenize(
            corpus, tokenizer, settings.length, settings.held_out_blocks * settings.length
        )
        drawn = torch.randint(len(blocks), (round(needed * shares[name]) + 1,), generator=generator)
        if len(drawn) <= len(blocks):  # without repetition where there is enough text
            drawn = torch.randperm(len(blocks), generator=generator)[: len(drawn)]
        train.append(blocks[drawn])
    mixed = torch.cat(train)
    return mixed[torch.randperm(len(mixed), generator=generator)[:needed]], held_out


def make_moe(dense: Any, train: Any, settings: Settings, seed: int) -> tuple[Any, Any]:
    """Upcycles. Experts are copies with some channels drawn anew; routers start at clusters of what they will see."""
    import hf_moe
    from hf_moe.upcycling import Drop, KMeans

    calibration = [{"input_ids": block[None]} for block in train[:16]]
    moe, report = hf_moe.upcycle(
        dense,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        layers=list(settings.layers),
        experts=Drop(settings.redrawn),
        router=KMeans(norm=settings.router_norm),
        calibration=calibration,
        target="moe_llama",
        check=False,
        seed=seed,
        router_aux_loss_coef=settings.aux_loss,
    )
    return moe, report


def train_moe(moe: Any, blocks: Any, settings: Settings, seed: int) -> dict:
    """Trains the upper layers with the stock `Trainer`: float32 weights, products in bfloat16."""
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_moe.quickstart.data import TokenBlocks
    from hf_moe.reporting import ExpertLoadCallback

    moe.requires_grad_(False)
    for layer in moe.model.layers[settings.train_from :]:
        layer.requires_grad_(True)
    with tempfile.TemporaryDirectory(prefix="hf-moe-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 10),
            logging_steps=max(1, settings.steps // 8),
            bf16=True,  # in half the time, also on a CPU
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(moe, arguments, train_dataset=TokenBlocks(blocks))
        ExpertLoadCallback().attach(trainer)
        start = time.perf_counter()
        trainer.train()
    moe.requires_grad_(True)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"log": logged, "train_seconds": time.perf_counter() - start}


def measure(model: Any, tokenizer: Any, held_out: dict[str, Any], settings: Settings, name: str) -> dict:
    """Perplexity and expert load per held-out domain, accuracy per number of steps."""
    from hf_moe.views import record_routing

    found: dict[str, Any] = {"perplexity": {}, "load": {}, "accuracy": {}}
    for domain, blocks in held_out.items():
        with record_routing(model, offload=True) as recorder:
            found["perplexity"] |= perplexities(model, {domain: blocks}, name)
        found["load"][domain] = expert_load(recorder)
    for steps in (1, 2) if settings.problems else ():
        problems = word_problems(0, settings.problems // 2, "test", steps)
        texts = solve(model, tokenizer, problems)
        found["accuracy"][str(steps)] = accuracy(texts, problems)
        found["sample"] = problems[0].prompt + texts[0]
    return found


def perplexities(model: Any, held_out: dict[str, Any], name: str) -> dict[str, float]:
    """Perplexity per domain."""
    from hf_moe.quickstart.data import held_out_perplexity

    return {domain: held_out_perplexity(model, blocks, f"{name}, {domain}") for domain, blocks in held_out.items()}


def expert_load(recorder: Any) -> list[list[float]]:
    """Share of the assignments per expert (column) and MoE layer (row)."""
    import torch

    loads = []
    for layer in recorder.layers:
        counts = torch.bincount(torch.cat(layer.top_k_index).flatten().cpu(), minlength=layer.view.num_experts)
        loads.append((counts / counts.sum()).tolist())
    return loads


def load_shift(one: list[list[float]], other: list[list[float]]) -> float:
    """Share of the assignments that move to another expert between two loads; mean over layers, 0 to 1."""
    from hf_moe.reporting.groups import total_variation

    return statistics.mean(total_variation(*rows) for rows in zip(one, other, strict=True))


def load_or_train(
    folder: str | Path,
    preset: str = "short",
    seed: int = 0,
    *,
    settings: Settings | None = None,
    source: tuple[Any, Any] | None = None,
    texts: dict[str, tuple[list[str], list[str]]] | None = None,
    dtype: str = "float32",
) -> tuple[Any, Any, dict]:
    """The model of this example: from `folder` where it was trained before, else trained now and kept there.

    The weights are kept in bfloat16, which is also what is returned the first time.

    Args:
        folder (`str` or `Path`): Holds one checkpoint per preset and seed.
        preset (`str`, defaults to `"short"`): `"short"` or `"full"`.
        seed (`int`, defaults to 0): Seed of upcycling, data order and arithmetic problems.
        settings ([`Settings`], *optional*): Instead of those of the preset, whose name then only names the checkpoint.
        source (`tuple`, *optional*): Dense Llama-like model and tokenizer; SmolLM2-135M by default.
        texts (`dict`, *optional*): As [`domains`] gives them.
        dtype (`str`, defaults to `"float32"`): Of the weights returned.

    Returns:
        `tuple`: Model in evaluation mode, tokenizer, what was measured (`before` and `after` training: perplexity and
        load per domain, accuracy; settings, seconds, provenance).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_moe  # makes the model type known

    if preset not in PRESETS and settings is None:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
    settings = settings or PRESETS[preset]
    place = Path(folder) / f"{preset}-seed{seed}"
    if not (place / "domain_moe.json").exists():
        dense, tokenizer = source or hf_moe.load_dense("auto")
        texts = domains(seed) if texts is None else texts
        moe, info = train_from_dense(dense, tokenizer, texts, settings, seed)
        with new_folder(place) as partial:
            moe.bfloat16().save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_text(partial / "domain_moe.json", json.dumps(info, indent=1) + "\n")
    info = json.loads((place / "domain_moe.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(place), info


def train_from_dense(dense: Any, tokenizer: Any, texts: dict, settings: Settings, seed: int) -> tuple[Any, dict]:
    """Upcycles, measures, trains, measures."""
    start = time.perf_counter()
    blocks, held_out = token_blocks(texts, tokenizer, settings, seed)
    dense_perplexity = perplexities(dense, held_out, "dense")
    moe, report = make_moe(dense, blocks, settings, seed)
    before = measure(moe, tokenizer, held_out, settings, "before")
    trained = train_moe(moe, blocks, settings, seed)
    after = measure(moe.eval(), tokenizer, held_out, settings, "after")
    info = {
        "seed": seed,
        "settings": asdict(settings),
        "source": report.source,
        "parameters": report.parameters,
        "active_parameters": report.active_parameters,
        "provenance": provenance(),
        "dense": {"perplexity": dense_perplexity},
        "before": before,
        "after": after,
        **trained,
        "seconds": time.perf_counter() - start,
    }
    return moe, info


def routing_shift(info: dict) -> dict[str, dict[str, float]]:
    """[`load_shift`] between every two domains after training."""
    load = info["after"]["load"]
    return {one: {other: load_shift(load[one], load[other]) for other in load} for one in load}


def summarise(infos: list[dict]) -> str:
    """Perplexity, accuracy and routing shift as Markdown tables, mean ± standard deviation over the seeds."""
    rows = [(f"perplexity, {name}", "perplexity", name) for name in infos[0]["after"]["perplexity"]]
    rows += [(f"problems of {steps} step(s) solved", "accuracy", steps) for steps in infos[0]["after"]["accuracy"]]
    lines = ["| held out | dense | upcycled | trained |", "|---|---|---|---|"]
    for label, kind, key in rows:
        cells = [
            spread([info[when][kind][key] for info in infos]) if kind in infos[0][when] else ""
            for when in ("dense", "before", "after")
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    names = list(infos[0]["after"]["load"])
    lines += ["", "Assignments that move to another expert between two domains (0 to 1), mean over layers:", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    shifts = [routing_shift(info) for info in infos]
    for one in names:
        cells = [spread([shift[one][other] for shift in shifts], 2) for other in names]
        lines.append(f"| {one} | " + " | ".join(cells) + " |")
    settings, first = infos[0]["settings"], infos[0]
    lines += [
        "",
        f"{len(infos)} seed(s): {', '.join(str(info['seed']) for info in infos)}. {first['source']} with "
        f"{settings['num_experts']} experts, top-{settings['top_k']}, in layers {list(settings['layers'])}; "
        f"{settings['steps']} steps of {settings['batch_size'] * settings['length']} tokens in "
        f"{spread([info['seconds'] for info in infos], 0)} seconds with measuring.",
        "",
        *(f"* {name}: {source}" for name, source in first["provenance"].items()),
    ]
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(info: dict, path: Path) -> None:
    """Expert load per domain, one panel per MoE layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    load, layers = info["after"]["load"], info["settings"]["layers"]
    figure = Figure(figsize=(3.4 * len(layers) + 1.2, 0.42 * len(load) + 1.8), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    highest = max(max(row) for rows in load.values() for row in rows)
    for column, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
        image = axes.imshow([rows[column] for rows in load.values()], cmap="Blues", vmin=0, vmax=highest)
        axes.set(title=f"layer {layer}", xlabel="expert", xticks=range(len(load[ARITHMETIC][column])))
        axes.set_yticks(range(len(load)), list(load))
    figure.colorbar(image, ax=list(panels), label="share of assignments", shrink=0.8)
    figure.suptitle(f"Expert load per held-out domain, seed {info['seed']}")
    FigureCanvasAgg(figure).print_png(path)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("domain-moe"), help="checkpoints, tables and plots")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, **overrides: Any) -> list[dict]:
    """`overrides` go to [`load_or_train`]; tests pass a tiny model with them."""
    args = parse_arguments(arguments)
    infos = [load_or_train(args.output, args.preset, seed, **overrides)[2] for seed in args.seeds]
    table = summarise(infos)
    shifts = {info["seed"]: routing_shift(info) for info in infos}
    write_text(args.output / "results.json", json.dumps({"runs": infos, "shift": shifts}, indent=1) + "\n")
    write_text(args.output / "results.md", table)
    for info in infos:
        draw(info, args.output / f"load-seed{info['seed']}.png")
    print(table)
    return infos


if __name__ == "__main__":
    main()
