"""Is `experts_implementation="hf_moe"` faster than what transformers ships, everywhere?

    python examples/benchmarks/experts.py --output out             # the whole table, about 25 minutes on one core
    python examples/benchmarks/experts.py --quick --output out     # a few cells, about a minute

Random banks of five geometries; every call has a routing of its own, implementations run in turn, ratios are taken
within a round and their median reported, CPU time of one thread (see `hf_moe/experts/benchmark/measure.py`, which
`hf-moe bench experts` uses, too). The reference is the fastest of transformers' own in each cell. Beside the table:

* the limit of the machine in each cell (the same arithmetic as dense products, or one pass over the weights that must
  be read, whichever is longer), and the share of it that is reached;
* what empty slots cost: 16 slots of which 2 are in use, against the same routing without the empty ones;
* peak memory of a training step.

Writes `experts.json`, `experts.md` and, where matplotlib is installed, `experts.png`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from hf_moe.experts.benchmark import GEOMETRIES, compare, markdown_table, peak_bytes, plot
from hf_moe.experts.benchmark.geometry import Geometry, make_experts, make_routing
from hf_moe.experts.kernels.compiled import compiler
from hf_moe.experts.kernels.selection import load_table, machine


INFERENCE, TRAINING = (1, 8, 64, 1024, 4096), (64, 1024)
# the largest cells of the largest banks cost minutes and say nothing new
_MOST_SLOTS = 9000


def cells(quick: bool, names: list[str]):
    """`(geometry, dtype, tokens, training)`."""
    for geometry in (GEOMETRIES[name] for name in (["C"] if quick else names)):
        for dtype in (torch.bfloat16, torch.float32):
            for training, ladder in ((False, (1, 64) if quick else INFERENCE), (True, (64,) if quick else TRAINING)):
                for tokens in ladder:
                    if tokens * geometry.slots <= _MOST_SLOTS:
                        yield geometry, dtype, tokens, training


def empty_slots(geometry: Geometry, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, float]:
    """Median ratio of a call with 16 slots, 2 of them in use, to the call with those 2; by implementation."""
    geometry = geometry._replace(slots=2)
    experts = make_experts(geometry, dtype)
    experts._is_expert_parallel = True  # slots may be empty
    generator = torch.Generator().manual_seed(0)
    ratios: dict[str, list[float]] = {name: [] for name in ("grouped_mm", "hf_moe")}
    for _ in range(rounds):
        for name, found in ratios.items():
            experts.config._experts_implementation = name
            hidden, index, weights = make_routing(geometry, tokens, dtype, generator)
            padding = (tokens, 14)
            padded_index = torch.cat([index, index.new_full(padding, geometry.experts)], dim=1)
            padded_weights = torch.cat([weights, weights.new_zeros(padding)], dim=1)
            seconds = []
            with torch.no_grad():
                experts(hidden, index, weights)  # both then find the kernels of these row counts
                for routing in ((padded_index, padded_weights), (index, weights)):
                    start = time.thread_time()
                    experts(hidden, *routing)
                    seconds.append(time.thread_time() - start)
            found.append(seconds[0] / seconds[1])
    return {name: statistics.median(found) for name, found in ratios.items()}


def training_memory(geometry: Geometry, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Peak bytes of forward and backward, by implementation."""
    experts = make_experts(geometry, dtype)
    peaks = {}
    for name in ("grouped_mm", "hf_moe", "hf_moe_exact", "hf_moe_bucketed"):
        experts.config._experts_implementation = name
        experts.zero_grad(set_to_none=True)
        hidden, index, weights = make_routing(geometry, tokens, dtype, torch.Generator().manual_seed(0))
        hidden.requires_grad_()
        weights.requires_grad_()
        peaks[name] = peak_bytes(lambda x=hidden, i=index, w=weights: experts(x, i, w).sum().backward())
    return peaks


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("experts-benchmark"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--geometry", nargs="+", choices=list(GEOMETRIES), default=list(GEOMETRIES))
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=compiler() is not None)
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"`--rounds` must be at least 1, got {args.rounds}")
    args.output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        comparisons = []
        banks: dict[tuple, torch.nn.Module] = {}
        for geometry, dtype, tokens, training in cells(args.quick, args.geometry):
            if (geometry, dtype) not in banks:
                banks = {(geometry, dtype): make_experts(geometry, dtype)}  # one at a time: they are large
            names = ["hf_moe", *(["hf_moe_compiled"] if args.compiled and not training else [])]
            cell = compare(names, geometry, dtype, tokens, training, args.rounds, experts=banks[geometry, dtype])
            comparisons.append(cell)
            print(f"{geometry} {cell.dtype} {cell.regime} {tokens}: {cell.ratio('hf_moe'):.2f}", file=sys.stderr)
        small = GEOMETRIES["C"]
        tokens = 256 if args.quick else 2048
        extras = {
            "machine": machine(),
            "selection": load_table().source,
            "empty slots": {
                str(dtype)[6:]: empty_slots(small, dtype, tokens, args.rounds)
                for dtype in (torch.bfloat16, torch.float32)
            },
            "training memory": {
                str(dtype)[6:]: training_memory(small, dtype, tokens) for dtype in (torch.bfloat16, torch.float32)
            },
        }
    finally:
        torch.set_num_threads(threads)
    text = markdown_table(comparisons) + "\n\n```json\n" + json.dumps(extras, indent=2) + "\n```\n"
    (args.output / "experts.md").write_text(text, encoding="utf-8")
    raw = [{**cell._asdict(), "geometry": cell.geometry._asdict()} for cell in comparisons]
    (args.output / "experts.json").write_text(json.dumps({"cells": raw, **extras}, indent=2), encoding="utf-8")
    print(text)
    try:
        plot(comparisons, args.output / "experts.png")
    except ImportError as error:
        print(error, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
