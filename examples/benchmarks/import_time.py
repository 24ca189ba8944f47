"""What `import hf_moe` adds to `import transformers, torch`: fresh interpreters, interleaved, medians.

    python examples/benchmarks/import_time.py --repeats 15

One line per statement: median, fastest and slowest of the CPU time the statement took inside the interpreter after
`import transformers, torch`. Wall time is given too; on a busy machine only CPU time is worth reading.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile


TARGET_SECONDS = 0.3
STATEMENTS = {
    "import hf_moe": "import hf_moe",
    # the part of it that is transformers' own: where its type table lives, which any later use of an Auto class needs
    "import transformers.models.auto.configuration_auto": "import transformers.models.auto.configuration_auto",
    # for comparison, what the first use of a model costs
    "from transformers import LlamaForCausalLM": "from transformers import LlamaForCausalLM",
    "from hf_moe import MoeLlamaForCausalLM": "from hf_moe import MoeLlamaForCausalLM",
}
PROGRAM = """
import time
start = time.perf_counter(), time.process_time()
import transformers, torch
middle = time.perf_counter(), time.process_time()
{statement}
end = time.perf_counter(), time.process_time()
import json
print(json.dumps([middle[0] - start[0], middle[1] - start[1], end[0] - middle[0], end[1] - middle[1]]))
"""


def measure(statement: str) -> list[float]:
    """Wall and CPU seconds of the two imports, then of the statement, in a fresh interpreter."""
    # away from the checkout: what counts is the installed package
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(statement=statement)],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
        )
    return json.loads(answer.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if `import hf_moe` misses the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=11, help="interpreters per statement, after one to warm up")
    parser.add_argument("--output", help="also write the numbers to this JSON file")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"`--repeats` must be at least 1, got {args.repeats}")
    samples = {name: [] for name in STATEMENTS}
    for round_ in range(args.repeats + 1):
        for name, statement in STATEMENTS.items():
            sample = measure(statement)
            if round_:  # the first round fills the file cache and writes byte code
                samples[name].append(sample)
    base = [sample for rows in samples.values() for sample in rows]
    print(f"{'after `import transformers, torch`':52} {'CPU median':>10} {'min':>7} {'max':>7} {'wall median':>12}")
    print(_line("(those two themselves)", [sample[:2] for sample in base]))
    results = {}
    for name, rows in samples.items():
        rows = [row[2:] for row in rows]
        results[name] = {kind: statistics.median(row[i] for row in rows) for i, kind in enumerate(("wall", "cpu"))}
        print(_line(name, rows))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    added = results["import hf_moe"]["cpu"]
    own = added - results["import transformers.models.auto.configuration_auto"]["cpu"]
    print(
        f"import hf_moe adds {added:.3f} s of CPU time, {own:.3f} s of it its own; the target is {TARGET_SECONDS} s."
    )
    return 0 if added < TARGET_SECONDS else 1


def _line(name: str, rows: list[list[float]]) -> str:
    wall, cpu = zip(*rows, strict=True)
    return f"{name:52} {statistics.median(cpu):10.3f} {min(cpu):7.3f} {max(cpu):7.3f} {statistics.median(wall):12.3f}"


if __name__ == "__main__":
    sys.exit(main())
