"""`hf-moe bench experts`: compare experts implementations on this machine, explain or tune the automatic choice."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path


__all__ = ["add_arguments", "run"]

REGIMES = {"decode": (1, 4, 8), "prefill": (64, 256, 1024, 4096), "train": (64, 256, 1024)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hf-moe bench`.

    Args:
        parser (`argparse.ArgumentParser`): The sub-command's parser.
    """
    parser.add_argument("what", choices=["experts"], help="what to measure")
    bank = parser.add_mutually_exclusive_group()
    bank.add_argument("--model", metavar="ID", help="folder or Hub id of a MoE model; only its config is read")
    bank.add_argument("--geometry", metavar="NAME", nargs="+", default=["SmolLM2"], help="A, B, C, D, SmolLM2")
    parser.add_argument("--regime", choices=[*REGIMES], nargs="+", default=["decode", "prefill"])
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="instead of the regime's numbers of tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], nargs="+", default=["bfloat16"])
    parser.add_argument("--implementations", nargs="+", metavar="NAME", default=["hf_moe"])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads; more than one is wall time")
    parser.add_argument("--plot", metavar="FILE", help="also draw the comparison (PNG or SVG)")
    parser.add_argument("--explain", action="store_true", help="only say which path runs where, and why")
    parser.add_argument("--tune", action="store_true", help="measure this machine's selection table and keep it")


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command.

    Args:
        args (`argparse.Namespace`): With the attributes of [`add_arguments`].

    Returns:
        `int`: 0.

    Raises:
        ValueError: an unknown geometry or implementation, a number out of range, a model without experts.
        ImportError: `--plot` without matplotlib, or `hf_moe_compiled` without a compiler.
    """
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if any(tokens < 1 for tokens in args.tokens or ()):
        raise ValueError(f"`--tokens` must be at least 1, got {args.tokens}.")

    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        if args.tune:
            return _tune()
        return _explain(args) if args.explain else _compare(args)
    finally:
        torch.set_num_threads(before)


def _geometries(args: argparse.Namespace) -> list:
    from .geometry import GEOMETRIES, geometry_of_config

    if args.model is not None:
        from transformers import AutoConfig

        return [geometry_of_config(AutoConfig.from_pretrained(args.model), args.model)]
    unknown = [name for name in args.geometry if name not in GEOMETRIES]
    if unknown:
        raise ValueError(f"`--geometry` must be among {[*GEOMETRIES]}, got {unknown[0]!r}.")
    return [GEOMETRIES[name] for name in args.geometry]


def _cells(args: argparse.Namespace) -> Iterator[tuple]:
    """`(geometry, dtype, tokens, training)` of every cell."""
    import torch

    for geometry in _geometries(args):
        for dtype in args.dtype:
            cells = [
                (tokens, regime == "train") for regime in args.regime for tokens in args.tokens or REGIMES[regime]
            ]
            for tokens, training in dict.fromkeys(cells):  # `--tokens` may name a cell of two regimes
                yield geometry, getattr(torch, dtype), tokens, training


def _compare(args: argparse.Namespace) -> int:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from .geometry import make_experts
    from .measure import compare
    from .results import markdown_table, plot

    for name in args.implementations:
        if name not in ALL_EXPERTS_FUNCTIONS.valid_keys():
            raise ValueError(f"`--implementations` must be among {ALL_EXPERTS_FUNCTIONS.valid_keys()}, got {name!r}.")
    if args.plot:
        import matplotlib  # noqa: F401  (before minutes of measuring, not after)
    comparisons = []
    experts = made_for = None
    for geometry, dtype, tokens, training in _cells(args):
        if made_for != (geometry, dtype):
            experts, made_for = make_experts(geometry, dtype), (geometry, dtype)
        clock = time.thread_time if args.threads == 1 else time.perf_counter
        cell = compare(
            args.implementations, geometry, dtype, tokens, training, args.rounds, clock=clock, experts=experts
        )
        comparisons.append(cell)
        print(f"{geometry} {cell.dtype} {cell.regime} {tokens} tokens: {cell.ratio(args.implementations[0]):.2f} "
              f"of {cell.best_of_transformers}", file=sys.stderr)  # fmt: skip
    print(markdown_table(comparisons))
    if args.plot:
        print(f"\nPlot: {plot(comparisons, Path(args.plot))}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    import torch

    from hf_moe.experts.kernels import choose_path
    from hf_moe.experts.kernels.compiled import compiler, load_compiled
    from hf_moe.experts.kernels.selection import PATHS, load_table, machine, table_path

    from .geometry import make_experts, make_routing

    table = load_table()
    print("machine: " + ", ".join(f"{key} {value}" for key, value in machine().items() if key != "host"))
    source = table.source if table.source != "defaults" else f"defaults (no measurement in {table_path()})"
    print(f"selection: {source}")
    print(f"compiled operator: {'loaded' if load_compiled() else 'not built'}; compiler: {compiler() or 'none'}")
    print("off the CPU, and for quantised or sharded experts: transformers' grouped_mm")
    print("under torch.compile: composed, around an opaque operator\n")
    generator = torch.Generator().manual_seed(0)
    for geometry, dtype, tokens, training in _cells(args):
        experts = make_experts(geometry._replace(hidden=16, intermediate=16), dtype)
        inputs = make_routing(geometry._replace(hidden=16), tokens, dtype, generator)
        with torch.set_grad_enabled(training):
            path = choose_path(experts, *inputs)
        regime = "train" if training else "inference"
        print(f"{geometry}, {str(dtype)[6:]}, {regime}, {tokens} tokens: {path} ({PATHS.get(path, path)})")
    return 0


def _tune() -> int:
    from hf_moe.experts.kernels.selection import save_table

    from .tuning import tune

    table = tune(progress=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"Selection table: {save_table(table)}")
    return 0
