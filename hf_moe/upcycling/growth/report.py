"""What growing a model promises and what was measured."""

from dataclasses import dataclass, field

from hf_moe.upcycling.report import ExactnessReport, MeasuredGap


__all__ = ["GrowthReport"]


@dataclass
class GrowthReport(ExactnessReport):
    """Result of [`grow_model`]: print it, save it, or put it in the model card.

    Args:
        source (`str`): Name of the small model.
        architecture (`str`): Class of both.
        before, after (`dict[str, int]`): Sizes by name.
        width, depth, order (`str`): As they were chosen.
        noise_std (`float`): Noise on added units.
        seed (`int`): Seed.
        depth_map (`list[int]`): Source layer of every layer.
        head_map (`list[int]`): Source head of every query head.
        predicted_exact (`bool`): Whether the result should equal the small model up to rounding.
        reason (`str`): Why, or why not.
        dense_parameters, parameters, num_bytes (`int`): Parameters before and after, memory after.
        measured ([`MeasuredGap`], *optional*): `None` with `check=False`.
        warnings (`list[str]`): What was warned of.
    """

    source: str
    architecture: str
    before: dict[str, int]
    after: dict[str, int]
    width: str
    depth: str
    order: str
    noise_std: float
    seed: int
    depth_map: list[int]
    head_map: list[int]
    predicted_exact: bool
    reason: str
    dense_parameters: int
    parameters: int
    num_bytes: int
    measured: MeasuredGap | None = None
    warnings: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        changed = [f"{k} {old} -> {self.after[k]}" for k, old in self.before.items() if old != self.after[k]]
        return [
            ("Source", f"{self.source} ({self.dense_parameters:,} parameters)"),
            ("Result", f"{self.architecture} ({self.parameters:,} parameters, {self.num_bytes / 2**20:,.1f} MiB)"),
            ("Function", self.verdict),
            ("Sizes", ", ".join(changed)),
            ("Width", f"{self.width}, {self.order} order" + (f", noise {self.noise_std:g}" if self.noise_std else "")),
            ("Depth", f"{self.depth}, layers {_ranges(self.depth_map)}"),
            ("Seed", str(self.seed)),
            *(("Warning", text) for text in self.warnings),
        ]


def _ranges(layers: list[int]) -> str:
    """`0-3, 3-5`: runs of consecutive layers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
