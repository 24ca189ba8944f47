"""The selection table of this machine, measured."""

import math
from collections.abc import Callable, Sequence

import torch

from hf_moe.experts.kernels.compiled import build_compiled, compiled_dtypes, compiler, load_compiled
from hf_moe.experts.kernels.selection import SelectionTable, rule_key

from .geometry import GEOMETRIES, Geometry, make_experts
from .measure import compare


__all__ = ["LADDERS", "tune"]

#: Rows per chosen expert at which paths are compared.
LADDERS = {False: (1, 4, 16, 48, 128, 384), True: (48, 128, 384)}
_PATHS = {False: ("decode", "exact", "bucketed"), True: ("exact", "bucketed")}

# Up to here a training step is the memory of its gradients, whoever computes them: other paths than transformers' own
# were faster on narrow banks and up to a tenth slower on wide ones, and the banks measured here are narrow. Only the
# compiled operators in float32 were faster on all.
_FEW_ROWS = 24.0

# A path must be this much faster than transformers' own before it is preferred: less is noise.
_MARGIN = 0.98


def tune(
    geometries: Sequence[Geometry] = (GEOMETRIES["C"], GEOMETRIES["SmolLM2"]),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    rounds: int = 7,
    progress: Callable[[str], None] = lambda line: None,
) -> SelectionTable:
    """Measures every path and keeps the best for each dtype, regime and number of rows.

    Builds the compiled operator if a compiler is installed.

    Args:
        geometries (`Sequence[Geometry]`): Banks; the mean over them decides.
        dtypes (`Sequence[torch.dtype]`): Dtypes.
        rounds (`int`, *optional*, defaults to 7): Rounds per cell.
        progress (`Callable`, *optional*): Told one line per cell.

    Returns:
        [`SelectionTable`]: Not saved yet; see `save_table`.
    """
    has_compiled = False
    if compiler() is not None:
        progress("building the compiled operator")
        try:
            build_compiled()
            has_compiled = load_compiled(build=True)
        except ImportError as error:
            progress(str(error))
    rules = {}
    for dtype in dtypes:
        banks = {geometry: make_experts(geometry, dtype) for geometry in geometries}
        for training, ladder in LADDERS.items():
            paths = list(_PATHS[training])
            if has_compiled and dtype in compiled_dtypes:
                paths.append("compiled")
            if dtype.itemsize > 2:
                paths.remove("bucketed")
            winners = []
            for rows in ladder:
                scores = dict.fromkeys(paths, 0.0)
                for geometry, experts in banks.items():
                    tokens = max(1, rows * geometry.experts // geometry.slots) if rows > 1 else 1
                    cell = compare(
                        [f"hf_moe_{path}" for path in paths],
                        geometry, dtype, tokens, training, rounds=rounds, experts=experts,
                    )  # fmt: skip
                    for path in paths:
                        scores[path] += math.log(cell.ratio(f"hf_moe_{path}", "grouped_mm")) / len(banks)
                best = min(scores, key=scores.__getitem__)
                winners.append(best if scores[best] < math.log(_MARGIN) else "grouped_mm")
                shown = ", ".join(f"{path} {math.exp(score):.2f}" for path, score in scores.items())
                progress(f"{rule_key(dtype, training)}, {rows} rows: {winners[-1]} ({shown})")
            rule = _rule(ladder, winners)
            if training:
                rule = _leave_few_rows(rule, dtype)
            rules[rule_key(dtype, training)] = rule
    return SelectionTable(rules, "measured")


def _rule(ladder: Sequence[int], winners: Sequence[str]) -> tuple[tuple[float, str], ...]:
    """Limits halfway (in the logarithm) between two sizes whose winners differ."""
    rule = []
    for i, winner in enumerate(winners):
        last = i + 1 == len(winners)
        if last or winners[i + 1] != winner:
            rule.append((math.inf if last else math.sqrt(ladder[i] * ladder[i + 1]), winner))
    return tuple(rule)


def _leave_few_rows(rule: tuple[tuple[float, str], ...], dtype: torch.dtype) -> tuple[tuple[float, str], ...]:
    """The rule for gradients, with few rows left to transformers' own where nothing is safely faster."""
    first = rule[0][1]
    if first == "grouped_mm" or (first == "compiled" and dtype == torch.float32):
        return rule
    return ((_FEW_ROWS, "grouped_mm"), *rule)
