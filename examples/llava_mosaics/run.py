"""LLaVA-MoD's three stages and MoE-LLaVA's on real pictures: questions about mosaics of Fashion-MNIST.

A small CLIP learns which caption belongs to which mosaic of up to four pictures; it is the frozen vision tower. The
teacher is a LLaVA of that tower and SmolLM2-135M. Students keep a fifth of its layers, and half of their feed-forwards
become four experts each. They learn the same questions (what is where, where is what, how many, is there one) for the
same number of steps in every arm:

    dense, supervised     no experts
    MoE-tuning            MoE-LLaVA: dense, then sparse, both on the right answers
    mimic distillation    LLaVA-MoD: dense to dense, then dense to sparse, from the teacher's predictions
    mimic, longer         the same, longer
    mimic + preference    instead, right answers preferred over wrong ones, the teacher as the reference

    python examples/llava_mosaics/run.py --images /usr/share/datasets/fashion-mnist      # short: 3 seeds
    python examples/llava_mosaics/run.py --preset full                                   # pictures from the Hub; a GPU

Held-out questions are about new pictures: in known words, in new words, and about classes at places where they never
are in training. All that was trained is kept in `OUTPUT`, so that an interrupted command continues where it stopped,
and several commands with different `--seeds` can share one tower and teacher. Writes results.json, results.md,
results.png and experts.png, which shows which experts see image tokens.

Papers: https://huggingface.co/papers/2401.15947 (MoE-LLaVA), https://huggingface.co/papers/2408.15881 (LLaVA-MoD).
"""

import argparse
import json
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import torch
from fashion_mnist import Pictures, load
from figures import draw_experts, draw_results, routes, summarise
from settings import PRESETS, Preset
from stages import ARMS, Workshop, is_done
from tower import make_tower, retrieval, train_tower

from hf_moe.files import write_text


__all__ = ["main", "run_seed"]

#: Pictures at the end of the training split that nothing is trained with; settings are chosen on them.
VALIDATION = 5000


def split(pictures: Pictures, validation: bool) -> Pictures:
    """The pictures to train with, and the held-out ones: the test split, or the end of the training split."""
    cut = len(pictures.train_labels) - min(VALIDATION, len(pictures.train_labels) // 4)
    held_out = (pictures.train_images[cut:], pictures.train_labels[cut:]) if validation else pictures[2:]
    return Pictures(pictures.train_images[:cut], pictures.train_labels[:cut], *held_out)


def prepare(args: argparse.Namespace, pictures: Pictures) -> None:
    """Trains tower and teacher where they are missing."""
    preset, folder = args.preset, args.output / "tower"
    settings = Workshop(preset, pictures, args.output).settings("tower")
    if not is_done(folder, settings):
        tower = make_tower(preset.tower_hidden, preset.tower_layers)
        seconds = train_tower(
            tower,
            pictures.train_images,
            pictures.train_labels,
            steps=preset.tower_steps,
            batch_size=preset.tower_batch,
            learning_rate=1e-3,
        )
        tower.save_pretrained(folder)
        found = retrieval(tower, pictures.test_images, pictures.test_labels)
        done = {"settings": settings, "seconds": seconds, "retrieval": found}
        write_text(folder / "done.json", json.dumps(done, indent=2) + "\n")
        print(f"tower: trained in {seconds:.0f} s, finds the caption among 100 for {found:.3f} of mosaics", flush=True)
    Workshop(preset, pictures, args.output).teacher()


def measure(model: Any, processor: Any, pictures: Pictures, preset: Preset) -> dict[str, Any]:
    """Figures of one model on each group of held-out questions, and its size."""
    from models import activated
    from scoring import answers, score

    figures: dict[str, Any] = {}
    for name, asked in questions(pictures, preset).items():
        figures[name] = score(asked, answers(model, processor, asked, pictures.test_images))
    return {**figures, **activated(model)}


def questions(pictures: Pictures, preset: Preset) -> dict[str, Any]:
    """The held-out questions, the same for every model and seed."""
    from data import held_out_questions
    from mosaics import draw_mosaics

    known = draw_mosaics(pictures.test_labels, preset.held_out, 100_001)
    unseen = draw_mosaics(pictures.test_labels, preset.held_out, 100_002, unseen=True)
    return held_out_questions(known, unseen, 100_003)


def majority_figures(pictures: Pictures, preset: Preset) -> dict[str, Any]:
    """Figures of answering with the most frequent answer of the kind."""
    import numpy as np
    from mosaics import draw_mosaics
    from questions import KINDS, ask
    from scoring import majority, score

    random = np.random.default_rng(0)
    mosaics = draw_mosaics(pictures.train_labels, 2000, 0)
    train = [(mosaic, ask(mosaic, kind, random)) for mosaic in mosaics for kind in KINDS]
    return {name: score(asked, majority(train, asked)) for name, asked in questions(pictures, preset).items()}


def run_seed(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Trains all arms with one seed, and measures them; what has been measured is read."""
    quiet(args.threads)
    pictures = split(load(args.images), args.validation)
    workshop = Workshop(args.preset, pictures, args.output)
    return [measured(args, workshop, pictures, arm, seed) for arm in ARMS]


def measured(args: argparse.Namespace, workshop: Workshop, pictures: Pictures, arm: str, seed: int | None) -> dict:
    """Figures of one arm (`"teacher"` has no seed), kept beside its model."""
    name = ARMS.get(arm, arm)
    folder = args.output / "teacher" if seed is None else args.output / f"seed-{seed}" / name.replace(" ", "-")
    file = folder / ("validation.json" if args.validation else "figures.json")
    if not file.exists():
        model, processor = workshop.teacher() if seed is None else workshop.student(name, seed)
        row = {"arm": arm, "seed": seed, **measure(model, processor, pictures, args.preset)}
        if seed is not None and row["activated"] != row["parameters"]:
            row["routes"] = routes(model, processor, questions(pictures, args.preset), pictures.test_images)
        write_text(file, json.dumps(row, indent=2) + "\n")
    row = json.loads(file.read_text(encoding="utf-8"))
    shown = ", ".join(f"{k} {row['new pictures'][k]:.3f}" for k in ("accuracy", "hallucination", "denial"))
    print(f"{arm}{'' if seed is None else f', seed {seed}'}: {shown}", flush=True)
    return row


def quiet(threads: int) -> None:
    """So many threads in each process, and no words from the libraries."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of Fashion-MNIST's idx files; from the Hub by default")
    parser.add_argument("--preset", choices=list(PRESETS), default="short")
    parser.add_argument("--seeds", type=int, nargs="*", help="other than the preset's; with none, the teacher alone")
    parser.add_argument("--model", help="folder or Hub id of the language model instead of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--validation", action="store_true", help="ask about pictures kept from training, not the test"
    )
    parser.add_argument("--processes", type=int, default=1, help="seeds at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--output", type=Path, default=Path("llava-mosaics"))
    args = parser.parse_args(arguments)
    args.preset = PRESETS[args.preset]
    if args.model is not None:
        args.preset = replace(args.preset, language_model=args.model)
    if args.seeds is None:
        args.seeds = list(args.preset.seeds)
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    quiet(args.threads)
    pictures = split(load(args.images), args.validation)
    prepare(args, pictures)
    workshop = Workshop(args.preset, pictures, args.output)
    teacher = measured(args, workshop, pictures, "teacher", None)
    if args.processes > 1 and len(args.seeds) > 1:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(args.processes, context) as pool:
            found = list(pool.map(run_seed, [args] * len(args.seeds), args.seeds))
    else:
        found = [run_seed(args, seed) for seed in args.seeds]
    if not found:
        return {"teacher": teacher}
    result = {
        "preset": asdict(args.preset),
        "majority": majority_figures(pictures, args.preset),
        "teacher": teacher,
        "rows": [row for rows in found for row in rows],
    }
    write_text(args.output / "results.json", json.dumps(result, indent=2) + "\n")
    table = summarise(result)
    write_text(args.output / "results.md", table)
    draw_results(result, args.output / "results.png")
    draw_experts(result, args.output / "experts.png")
    print(f"\n{table}")
    return result


if __name__ == "__main__":
    main()
