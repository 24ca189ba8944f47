"""Which path runs: defaults that are right on most machines, and a table measured on this one.

The rows per chosen expert decide, with the dtype and whether gradients are needed: from one to a few, time is the
reading of weights; in the hundreds, it is the products.
"""

import functools
import json
import math
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_moe.files import write_text
from hf_moe.weights.cache import default_cache_dir


__all__ = ["DEFAULT_TABLE", "PATHS", "SelectionTable", "load_table", "machine", "save_table", "table_path"]

#: The ways to run a bank, and what each is for.
PATHS = {
    "decode": "all first products, one activation, all second products; no gradients",
    "exact": "expert by expert in kept buffers",
    "bucketed": "expert by expert, row counts rounded up so that few kernels are generated",
    "compiled": "as decode, or as exact for many rows and for gradients, with the compiled operators",
    "grouped_mm": "transformers' own",
}

_VERSION = 1


class SelectionTable(NamedTuple):
    """For each dtype and regime, up to how many rows per chosen expert which path is best.

    Args:
        rules (`dict`): `"bfloat16/inference"` -> `[(rows, path), ...]` ascending; the last has no limit.
        source (`str`): `"defaults"`, or the file it was read from.
    """

    rules: dict[str, tuple[tuple[float, str], ...]]
    source: str = "defaults"

    def choose(self, dtype: torch.dtype, training: bool, rows_per_expert: float) -> str:
        """The path for a call.

        Args:
            dtype (`torch.dtype`): Of the weights.
            training (`bool`): Whether gradients are needed.
            rows_per_expert (`float`): Slots per expert that could be chosen: `T K / min(N, T K)`.

        Returns:
            `str`: One of [`PATHS`].

        Example:
            ```python
            >>> DEFAULT_TABLE.choose(torch.bfloat16, training=False, rows_per_expert=1)
            'decode'
            ```
        """
        rules = self.rules.get(rule_key(dtype, training)) or DEFAULT_TABLE.rules.get(rule_key(dtype, training))
        if rules is None:
            return "exact"
        return next(path for limit, path in rules if rows_per_expert <= limit)


def rule_key(dtype: torch.dtype, training: bool) -> str:
    """`"bfloat16/training"`."""
    return f"{str(dtype).removeprefix('torch.')}/{'training' if training else 'inference'}"


_GENERATED = ((8.0, "decode"), (math.inf, "bucketed"))
_GENERATED_TRAINING = ((24.0, "grouped_mm"), (math.inf, "bucketed"))

#: What holds without a measurement: never slower than transformers where that was not shown.
DEFAULT_TABLE = SelectionTable(
    {
        "bfloat16/inference": _GENERATED,
        "float16/inference": _GENERATED,
        "float32/inference": ((16.0, "decode"), (48.0, "grouped_mm"), (math.inf, "exact")),
        "bfloat16/training": _GENERATED_TRAINING,
        "float16/training": _GENERATED_TRAINING,
        "float32/training": ((256.0, "grouped_mm"), (math.inf, "exact")),
    }
)


def machine() -> dict[str, Any]:
    """What a measurement depends on: the CPU and torch's version. (Threads change the times, hardly the order.)"""
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "host": platform.node(),
    }


def cpu_name() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table_path() -> Path:
    """Where the table of this machine is kept; it need not exist."""
    return default_cache_dir() / "kernels" / "selection.json"


def save_table(table: SelectionTable, path: Path | None = None) -> Path:
    """Writes a table for this machine, whole or not at all, and makes this process use it.

    Args:
        table ([`SelectionTable`]): Measured rules.
        path (`Path`, *optional*): File; [`table_path`] by default.

    Returns:
        `Path`
    """
    path = table_path() if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    rules = {
        key: [[None if math.isinf(limit) else limit, name] for limit, name in rule]
        for key, rule in table.rules.items()
    }
    write_text(path, json.dumps({"version": _VERSION, "machine": machine(), "rules": rules}, indent=2) + "\n")
    load_table.cache_clear()
    return path


@functools.cache
def load_table(path: Path | None = None) -> SelectionTable:
    """The table in use: the measured one if there is one for this machine, else [`DEFAULT_TABLE`].

    Args:
        path (`Path`, *optional*): File; [`table_path`] by default. Read once per process.

    Returns:
        [`SelectionTable`]
    """
    path = table_path() if path is None else path
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["version"] != _VERSION or stored["machine"] != machine():
            return DEFAULT_TABLE
        rules = {
            str(key): tuple((math.inf if limit is None else float(limit), str(name)) for limit, name in rule)
            for key, rule in stored["rules"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return DEFAULT_TABLE  # absent or unreadable: a table is only ever an optimisation
    for rule in rules.values():
        if not rule or not math.isinf(rule[-1][0]) or any(name not in PATHS for _, name in rule):
            return DEFAULT_TABLE
    return SelectionTable(rules, str(path))
