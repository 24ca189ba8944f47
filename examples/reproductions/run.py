"""Runs the reproductions of this folder and writes one table: every arm with every seed, 95 % confidence intervals.

    python examples/reproductions/run.py                                # all, short: half an hour on two cores
    python examples/reproductions/run.py --only comet evomoe            # some of them
    python examples/reproductions/run.py --preset full --processes 8    # larger models, more steps and seeds
    python examples/reproductions/run.py --preset tiny                  # does everything run?

Text: five kinds of text that every machine with this package has (`hf_moe/corpora.py`); nothing is downloaded. Every
run is kept in `OUTPUT/runs`, so that an interrupted command continues where it stopped.
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from harness import PRESETS, Bench, Reproduction
from summary import draw, summarise, verdicts

from hf_moe.files import write_text


__all__ = ["find_reproductions", "main", "run_one"]

#: Modules of this folder that are no reproductions.
SHARED = ("harness", "run", "summary", "text")


def find_reproductions() -> list[str]:
    """Names of the reproductions: the files of this folder that are not shared by all."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in SHARED)


def load(name: str) -> Reproduction:
    """The `REPRODUCTION` of one file."""
    return importlib.import_module(name).REPRODUCTION


def start_worker() -> None:
    """One thread and no output for each process: as many runs as cores go on at a time."""
    import warnings

    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def run_one(name: str, arm: str, seed: int, preset: str, file: Path) -> dict:
    """Runs one arm with one seed, and writes its figures.

    Args:
        name (`str`): Of the reproduction.
        arm (`str`): One of its arms.
        seed (`int`): Seed of the run.
        preset (`str`): A key of `PRESETS`.
        file (`Path`): Where the figures are kept.

    Returns:
        `dict`: The run.
    """
    import torch

    start = time.perf_counter()
    torch.manual_seed(seed)
    figures = load(name).arms[arm](Bench(PRESETS[preset], seed))
    run = {
        "reproduction": name,
        "arm": arm,
        "seed": seed,
        "preset": asdict(PRESETS[preset]),
        "figures": {key: float(value) for key, value in figures.items()},
        "seconds": time.perf_counter() - start,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(run, indent=2) + "\n")
    return run


def run_file(folder: Path, name: str, arm: str, seed: int) -> Path:
    """Where a run is kept."""
    plain = "".join(c if c.isalnum() else "-" for c in arm.lower())
    return folder / "runs" / name / f"{plain}-{seed}.json"


def kept(file: Path, preset: str) -> dict | None:
    """A run of this preset that is already there."""
    if not file.exists():
        return None
    run = json.loads(file.read_text(encoding="utf-8"))
    same = json.dumps(run["preset"]) == json.dumps(asdict(PRESETS[preset]))
    return run if same else None


def run_all(names: list[str], preset: str, processes: int, folder: Path) -> list[dict]:
    """Every arm of every reproduction with every seed, those that are kept apart; arms alternate within a seed."""
    runs, waiting = [], []
    for name in names:
        for seed in PRESETS[preset].seeds:
            for arm in load(name).arms:
                file = run_file(folder, name, arm, seed)
                found = kept(file, preset)
                if found is not None:
                    runs.append(found)
                else:
                    waiting.append((name, arm, seed, preset, file))
    print(f"{len(waiting)} runs to do, {len(runs)} kept", flush=True)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(min(processes, max(1, len(waiting))), context, start_worker)
    try:
        tasks = [pool.submit(run_one, *task) for task in waiting]
        for number, task in enumerate(as_completed(tasks), 1):
            run = task.result()
            runs.append(run)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in run["figures"].items())
            print(
                f"[{number}/{len(tasks)}] {run['reproduction']}: {run['arm']}, seed {run['seed']}: {shown} "
                f"({run['seconds']:.0f} s)",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)
    order = {name: list(load(name).arms) for name in names}
    return sorted(
        runs, key=lambda r: (names.index(r["reproduction"]), order[r["reproduction"]].index(r["arm"]), r["seed"])
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="short")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(find_reproductions())}")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=Path("reproductions"))
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.only or ()) - set(find_reproductions()))
    if unknown:
        parser.error(f"`--only` names {unknown}; there are {find_reproductions()}")
    if args.processes < 1:
        parser.error(f"`--processes` must be at least 1, got {args.processes}")
    return args


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse_arguments(arguments)
    names = args.only or find_reproductions()
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    runs = run_all(names, args.preset, args.processes, args.output)
    rows = verdicts([load(name) for name in names], runs)
    write_text(args.output / "results.json", json.dumps({"rows": rows, "runs": runs}, indent=2) + "\n")
    table = summarise([load(name) for name in names], rows)
    write_text(args.output / "results.md", table)
    draw([load(name) for name in names], runs, args.output / "results.png")
    print(f"\n{table}\n{time.perf_counter() - start:.0f} s; written to {args.output}")
    return rows


if __name__ == "__main__":
    main()
