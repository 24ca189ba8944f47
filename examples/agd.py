"""Guidance in one pass: a small diffusion transformer trained on Fashion-MNIST, its guidance distilled into adapters
(AGD), and three ways to sample from it: guided by two predictions per step, by the adapters with one, and not at all.

    python examples/agd.py --data /usr/share/datasets/fashion-mnist      # three seeds, about six minutes on one core
    python examples/agd.py --preset full --seeds 0 1 2 3 4 --output out

The base (pictures of 14 x 14, ten classes, labels dropped one time in ten) and the classifier that judges the samples
are trained once, and a base in the output folder is used again; trajectories, adapters and noise differ from seed to
seed. Written are `results.json`, `results.md`, `agd.png` and one adapter per seed. Data: see `fashion_mnist.py`.

Paper: https://huggingface.co/papers/2503.07274
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F

from hf_moe import AgdConfig
from hf_moe.adapters.agd import AgdDataset, DenoisingLoop, agd_guidance, record_trajectories, save_agd
from hf_moe.files import write_text
from hf_moe.trainers import GuidanceDistillationConfig, GuidanceDistillationTrainer


sys.path.insert(0, str(Path(__file__).parent))

from fashion_mnist import CLASSES, Pictures, load


NULL = len(CLASSES)  # the class that stands for none
ADAPTER_OPTIONS = ("architecture", "adapter_steps", "adapter_learning_rate")
METHODS = ("cfg", "agd", "none")
TITLES = {"cfg": "CFG, two predictions", "agd": "AGD, one prediction", "none": "no guidance, one prediction"}


@dataclass(frozen=True)
class Settings:
    """What one run does."""

    width: int = 64
    layers: int = 4
    base_steps: int = 800
    batch_size: int = 64
    base_learning_rate: float = 2e-3
    classifier_steps: int = 1000
    sampling_steps: int = 20
    scale_range: tuple[float, float] = (1.0, 3.0)
    trajectories: int = 160
    architecture: str = "cross_attention"
    adapter_width: int = 12
    adapter_steps: int = 400
    adapter_learning_rate: float = 1e-2
    scales: tuple[float, ...] = (1.5, 2.5)
    samples: int = 300
    rounds: int = 5
    round_samples: int = 100


PRESETS = {
    "short": Settings(),
    "full": Settings(
        width=128, layers=6, base_steps=12_000, batch_size=128, base_learning_rate=1e-3, trajectories=2000,
        adapter_width=24, adapter_steps=5000, adapter_learning_rate=1e-3, scale_range=(1.0, 6.0),
        scales=(1.5, 2.0, 3.0, 4.0, 6.0),
        samples=5000, rounds=15,
    ),
}  # fmt: skip


def pictures(images: Any) -> torch.Tensor:
    """`(N, 28, 28)` bytes as `(N, 1, 14, 14)` between -1 and 1."""
    return F.avg_pool2d(torch.as_tensor(images)[:, None].float() / 127.5 - 1.0, 2)


def batches(x: torch.Tensor, y: torch.Tensor, size: int, steps: int, seed: int):
    """Random batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(0, len(x), (size,), generator=generator)
        yield x[index], y[index]


def scheduler() -> DDIMScheduler:
    """The noise schedule of training and sampling."""
    return DDIMScheduler(clip_sample=True, clip_sample_range=1.0, timestep_spacing="trailing")


def train_base(x: torch.Tensor, y: torch.Tensor, settings: Settings) -> DiTTransformer2DModel:
    """A class-conditional diffusion transformer; its label embedding drops a tenth of the labels while it trains."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=settings.width // 4, in_channels=1, out_channels=1, sample_size=14,
        num_layers=settings.layers, patch_size=2, num_embeds_ada_norm=len(CLASSES), norm_num_groups=1,
    )  # fmt: skip
    for block in model.transformer_blocks:  # blocks that start as the identity, as in the paper of DiT
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    noise_schedule = scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.base_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.base_learning_rate, total_steps=settings.base_steps, pct_start=0.1
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99 if settings.base_steps < 5000 else 0.999)
    )
    torch.manual_seed(1)
    model.train()
    for clean, labels in batches(x, y, settings.batch_size, settings.base_steps, seed=1):
        t = torch.randint(0, 1000, (len(clean),))
        noise = torch.randn_like(clean)
        predicted = model(noise_schedule.add_noise(clean, noise, t), t, labels).sample
        optimizer.zero_grad()
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    return model.eval().requires_grad_(False)


class Classifier(nn.Module):
    """Judges samples: 32 features for the Frechet distance, ten classes for the accuracy."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 9, 32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def train_classifier(x: torch.Tensor, y: torch.Tensor, settings: Settings) -> Classifier:
    """A convolutional classifier of the real pictures."""
    torch.manual_seed(2)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for images, labels in batches(x, y, 128, settings.classifier_steps, seed=2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features `(N, D)`."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def quality(samples: torch.Tensor, labels: torch.Tensor, judge: Classifier, real: torch.Tensor) -> dict[str, float]:
    """Distance to the real pictures, and how often the classifier sees the class that was asked for."""
    accuracy = (judge(samples).argmax(1) == labels).float().mean().item()
    return {"frechet": frechet(judge.body(samples), judge.body(real)), "accuracy": accuracy}


def distil(base: nn.Module, settings: Settings, seed: int, folder: Path) -> tuple[Any, dict[str, float]]:
    """Records guided trajectories of the base and trains adapters on them."""
    loop = DenoisingLoop(base, scheduler(), (1, 14, 14), {"class_labels": NULL}, settings.sampling_steps)

    def record(name: str, number: int, seed: int) -> AgdDataset:
        labels = {"class_labels": torch.arange(number) % len(CLASSES)}
        path = record_trajectories(
            loop, labels, folder / name, scale_range=settings.scale_range, seed=seed, shard_size=64
        )
        return AgdDataset(path, in_memory=True)

    train = record(f"trajectories-seed{seed}", settings.trajectories, seed)
    held_out = record(f"held-out-seed{seed}", max(settings.trajectories // 8, 10), 1000 + seed)
    torch.manual_seed(seed)
    arguments = GuidanceDistillationConfig(
        str(folder / f"training-seed{seed}"), max_steps=settings.adapter_steps, per_device_train_batch_size=64,
        learning_rate=settings.adapter_learning_rate, per_device_eval_batch_size=160, seed=seed, save_strategy="no",
        report_to=[], disable_tqdm=True, logging_steps=10**6, use_cpu=True,
    )  # fmt: skip
    trainer = GuidanceDistillationTrainer(
        copy.deepcopy(base), arguments, train_dataset=train, eval_dataset=held_out,
        peft_config=AgdConfig(architecture=settings.architecture, hidden_size=settings.adapter_width),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trained, total = trainer.model.get_nb_trainable_parameters()
    adapter = folder / f"adapter-seed{seed}"
    if not adapter.exists():
        save_agd(trainer.model, adapter)
    facts = {"mse_before": before, "mse_after": after, "trained": trained, "share": trained / (total - trained)}
    return trainer.model.eval(), facts


def sampler(model: Any, settings: Settings) -> Callable[..., torch.Tensor]:
    """`sample(method, labels, scale, seed)`; the noise is the same for all methods."""
    loop = DenoisingLoop(model, scheduler(), (1, 14, 14), {"class_labels": NULL}, settings.sampling_steps)

    def sample(method: str, labels: torch.Tensor, scale: float, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        conditions = {"class_labels": labels}
        if method == "cfg":
            return loop.guided(conditions, scale, generator)
        if method == "agd":
            with agd_guidance(model, scale):
                return loop.single(conditions, generator)
        with model.disable_adapter():
            return loop.single(conditions, generator)

    return sample


def measure_time(sample: Callable, settings: Settings) -> dict[str, Any]:
    """Seconds per method, in turn within each round, and the medians of the rounds' ratios to CFG."""
    labels = torch.arange(settings.round_samples) % len(CLASSES)
    wall, cpu = ({method: [] for method in METHODS} for _ in range(2))
    for turn in range(settings.rounds + 1):
        for method in METHODS:
            start, start_cpu = time.perf_counter(), time.process_time()
            sample(method, labels, settings.scales[-1], turn)
            if turn:  # the first round warms up
                wall[method].append(time.perf_counter() - start)
                cpu[method].append(time.process_time() - start_cpu)

    def ratio(times: dict[str, list[float]], method: str) -> float:
        return statistics.median(a / b for a, b in zip(times[method], times["cfg"], strict=True))

    found: dict[str, Any] = {"wall_seconds": {method: statistics.median(wall[method]) for method in METHODS}}
    found["wall_ratio"] = {method: ratio(wall, method) for method in METHODS}
    found["cpu_ratio"] = {method: ratio(cpu, method) for method in METHODS}
    return found


def run_seed(
    base: nn.Module, judge: Classifier, real: torch.Tensor, settings: Settings, seed: int, folder: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Everything that differs from seed to seed."""
    model, facts = distil(base, settings, seed, folder)
    sample = sampler(model, settings)
    labels = torch.arange(settings.samples) % len(CLASSES)
    rows = []
    for scale in settings.scales:
        for method in METHODS:
            if method == "none" and scale != settings.scales[0]:
                continue  # no scale, no difference
            samples = torch.cat(
                [sample(method, part, scale, 7919 * seed + i) for i, part in enumerate(labels.split(100))]
            )
            rows.append({"method": method, "scale": scale, **quality(samples, labels, judge, real)})
    grid = {method: sample(method, torch.arange(len(CLASSES)), settings.scales[-1], seed) for method in METHODS}
    return {"seed": seed, **facts, "quality": rows, "time": measure_time(sample, settings)}, grid


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def summarise(runs: list[dict[str, Any]], facts: dict[str, float], settings: Settings) -> str:
    """The results as a Markdown table."""
    lines = [
        "| sampling | scale | Frechet distance | accuracy | time / CFG (wall) | time / CFG (CPU) |",
        "|---|---|---|---|---|---|",
    ]
    for scale in settings.scales:
        for method in METHODS:
            rows = [row for run in runs for row in run["quality"] if (row["method"], row["scale"]) == (method, scale)]
            if rows:
                times = [
                    spread([run["time"][kind][method] for run in runs], 3) for kind in ("wall_ratio", "cpu_ratio")
                ]
                lines.append(
                    f"| {TITLES[method]} | {'-' if method == 'none' else f'{scale:g}'} "
                    f"| {spread([row['frechet'] for row in rows], 2)} "
                    f"| {spread([row['accuracy'] for row in rows], 3)} "
                    f"| {times[0]} | {times[1]} |"
                )
    share = runs[0]["share"]
    lines += [
        "",
        f"Real test pictures: distance {facts['real_frechet']:.2f}, accuracy {facts['real_accuracy']:.3f}. Trained: "
        f"{runs[0]['trained']} parameters, {100 * share:.2f} % of the base's. Error of one prediction against the "
        f"guided one on held-out trajectories: {spread([run['mse_before'] for run in runs], 4)} without the adapters, "
        f"{spread([run['mse_after'] for run in runs], 4)} with them. {len(runs)} seed(s), mean ± standard deviation.",
    ]
    return "\n".join(lines) + "\n"


def draw(
    runs: list[dict[str, Any]], grid: dict[str, torch.Tensor], facts: dict, settings: Settings, path: Path
) -> None:
    """Samples of the first seed, same noise in each column, and both measures over the scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1.0])
    axes = top.subplots(3, len(CLASSES))
    for row, method in enumerate(METHODS):
        for column, name in enumerate(CLASSES):
            axis = axes[row][column]
            axis.imshow(grid[method][column, 0].clamp(-1, 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=8)
        axes[row][0].set_ylabel({"cfg": "CFG", "agd": "AGD", "none": "no\nguidance"}[method], fontsize=9)
    top.suptitle(f"Samples at scale {settings.scales[-1]:g}, the same noise in each column", fontsize=10)
    measures = bottom.subplots(1, 3)
    colours = {"cfg": "#1f77b4", "agd": "#d95f02", "none": "#7f7f7f"}
    for axis, key, title in zip(measures, ("frechet", "accuracy"), ("Frechet distance", "accuracy"), strict=False):
        for method in ("cfg", "agd"):
            found = [
                [
                    row[key]
                    for run in runs
                    for row in run["quality"]
                    if (row["method"], row["scale"]) == (method, scale)
                ]
                for scale in settings.scales
            ]
            means = [statistics.mean(values) for values in found]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found]
            axis.errorbar(
                settings.scales, means, errors, marker="o", capsize=3, color=colours[method], label=method.upper()
            )
        plain = [row[key] for run in runs for row in run["quality"] if row["method"] == "none"]
        axis.axhline(statistics.mean(plain), color=colours["none"], linestyle="--", label="no guidance")
        axis.axhline(facts[f"real_{key}"], color="black", linestyle=":", label="real pictures")
        axis.set_xlabel("guidance scale")
        axis.set_title(f"{title} ({'lower' if key == 'frechet' else 'higher'} is better)", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    ratios = [statistics.mean([run["time"]["wall_ratio"][method] for run in runs]) for method in METHODS]
    bars = measures[2].bar(["CFG", "AGD", "no guidance"], ratios, color=[colours[method] for method in METHODS])
    measures[2].bar_label(bars, fmt="%.2f", fontsize=8)
    measures[2].set_ylim(0, 1.15 * max(ratios))
    measures[2].set_title("sampling time / CFG (wall)", fontsize=9)
    figure.savefig(path, dpi=120)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name in ADAPTER_OPTIONS:
        kind = type(getattr(PRESETS["short"], name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="in place of the preset's")
    parser.add_argument("--data", help="folder with the idx files of Fashion-MNIST; from the Hub if left out")
    parser.add_argument("--output", type=Path, default=Path("agd-output"))
    return parser.parse_args(arguments)


def main(
    arguments: list[str] | None = None, data: Pictures | None = None, settings: Settings | None = None
) -> list[dict[str, Any]]:
    """`data` and `settings` are for tests; they replace `--data` and `--preset`."""
    args = parse_arguments(arguments)
    given = {name: value for name, value in vars(args).items() if value is not None and name in ADAPTER_OPTIONS}
    settings = replace(settings or PRESETS[args.preset], **given)
    data = data or load(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    x, y = pictures(data.train_images), torch.as_tensor(data.train_labels).long()
    real, real_y = pictures(data.test_images), torch.as_tensor(data.test_labels).long()
    start = time.process_time()
    judge = train_classifier(x, y, settings)
    facts = {"real_accuracy": (judge(real).argmax(1) == real_y).float().mean().item()}
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[: settings.samples]
    facts["real_frechet"] = frechet(judge.body(x[some]), judge.body(real))
    print(
        f"classifier: accuracy {facts['real_accuracy']:.3f}, {time.process_time() - start:.0f} s of CPU time",
        flush=True,
    )
    if (args.output / "base").exists():
        base = DiTTransformer2DModel.from_pretrained(args.output / "base").eval().requires_grad_(False)
    else:
        base = train_base(x, y, settings)
        base.save_pretrained(args.output / "base")
    print(f"base ready, {time.process_time() - start:.0f} s", flush=True)
    runs, grids = [], []
    for seed in args.seeds:
        run, grid = run_seed(base, judge, real, settings, seed, args.output)
        runs.append(run)
        grids.append(grid)
        print(f"seed {seed}: {run['time']['wall_ratio']}, {time.process_time() - start:.0f} s", flush=True)
    results = {"settings": asdict(settings), **facts, "cpu_seconds": time.process_time() - start, "runs": runs}
    table = summarise(runs, facts, settings)
    write_text(args.output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(args.output / "results.md", table)
    draw(runs, grids[0], facts, settings, args.output / "agd.png")
    print(table)
    return runs


if __name__ == "__main__":
    main()
