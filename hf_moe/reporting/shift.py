"""How routing differs between two models, two times of one model, or two texts.

Shapes: T tokens, N experts, K per token.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_moe.routing.balance import expert_counts

from .folder import replace_files
from .snapshot import LayerSnapshot, RoutingSnapshot


__all__ = ["SHIFT_FILES", "LayerShift", "ShiftReport", "routing_shift"]

SHIFT_FILES = ("routing_shift.png", "shift.json", "shift.md")
# Rows of probabilities that become float32 at once.
CHUNK = 4096


@dataclass
class LayerShift:
    """How one MoE layer differs between A and B. Shares are 0 (the same) to 1 (nothing in common).

    Args:
        name (`str`): Path of the block in A.
        num_experts (`int`): N.
        expert_labels (`list[str]`): A short name per expert.
        load_a (`list[float]`): Share of assignments per expert in A, sum 1.
        load_b (`list[float]`): The same in B.
        load_shift (`float`): Share of the assignments that would have to move for both loads to be equal (total
            variation).
        probability_shift (`float`): The same for the mean of the routers' distributions.
        selection_shift (`float`, *optional*): The expert-selection shift of single-expert unlearning: share of the
            experts chosen for a token in A that are not chosen for it in B, mean over tokens. `None` where A and B
            saw different texts, like the next two.
        best_shift (`float`, *optional*): Share of the tokens whose most probable expert is another one.
        token_shift (`float`, *optional*): Total variation of the two distributions of a token, mean over tokens.

    Example:
        ```python
        max(shift.layers, key=lambda layer: layer.selection_shift).name  # where routing changed most
        ```
    """

    name: str
    num_experts: int
    expert_labels: list[str]
    load_a: list[float]
    load_b: list[float]
    load_shift: float
    probability_shift: float
    selection_shift: float | None = None
    best_shift: float | None = None
    token_shift: float | None = None


@dataclass
class ShiftReport:
    """How routing differs between A and B; made by [`routing_shift`].

    Args:
        name_a (`str`): What was looked at first.
        name_b (`str`): What it is compared with.
        tokens_a (`int`): Tokens A routed.
        tokens_b (`int`): Tokens B routed.
        paired (`bool`): Both routed the same tokens, so that they can be compared one by one.
        layers (`list[LayerShift]`): One per MoE layer.

    Example:
        ```python
        routing_shift(before, after).save("shift")
        ```
    """

    name_a: str
    name_b: str
    tokens_a: int
    tokens_b: int
    paired: bool
    layers: list[LayerShift]

    def metrics(self) -> dict[str, float]:
        """Means over layers, and the layer that changed most; for a log or a card."""
        names = ["load_shift", "probability_shift"]
        names += ["selection_shift", "best_shift", "token_shift"] if self.paired else []
        values = {name: sum(getattr(layer, name) for layer in self.layers) / len(self.layers) for name in names}
        main = "selection_shift" if self.paired else "load_shift"
        values[f"{main}_worst_layer"] = max(getattr(layer, main) for layer in self.layers)
        return values

    def table(self) -> list[dict[str, str | int]]:
        """One row per MoE layer, ready to print: column name to value."""
        rows = []
        for layer in self.layers:
            moved = [b - a for a, b in zip(layer.load_a, layer.load_b, strict=True)]
            gained = max(range(layer.num_experts), key=moved.__getitem__)
            lost = min(range(layer.num_experts), key=moved.__getitem__)
            row: dict[str, str | int] = {"Layer": layer.name, "Experts": layer.num_experts}
            if self.paired:
                row["Selection shift"] = f"{layer.selection_shift:.3f}"
                row["Other best expert"] = f"{layer.best_shift:.3f}"
                row["Token shift"] = f"{layer.token_shift:.3f}"
            row["Load shift"] = f"{layer.load_shift:.3f}"
            row["Probability shift"] = f"{layer.probability_shift:.3f}"
            row["Gained most"] = f"{layer.expert_labels[gained]} ({moved[gained]:+.1%})"
            row["Lost most"] = f"{layer.expert_labels[lost]} ({moved[lost]:+.1%})"
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {**asdict(self), "metrics": self.metrics()}

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `shift.md`, `shift.json` and `routing_shift.png`; an older report stays as it was on failure.

        Args:
            directory (`str` or `os.PathLike`): Created if missing. Other files in it stay.

        Returns:
            `Path`: `directory`.

        Raises:
            OSError: `directory` cannot be written.
            ImportError: matplotlib is not installed.
        """
        from .drawing import write_figure
        from .markdown import render_shift
        from .shift_plot import draw_shift

        with replace_files(directory, SHIFT_FILES) as temporary:
            write_figure(draw_shift(self), temporary / "routing_shift.png")
            (temporary / "shift.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            (temporary / "shift.md").write_text(render_shift(self), encoding="utf-8")
        return Path(directory)


def routing_shift(a: RoutingSnapshot, b: RoutingSnapshot, *, reduce: bool = False) -> ShiftReport:
    """Compares two snapshots: of two models on a text, of a model before and after training, of a model on two texts.

    Where both saw the same tokens they are also compared token by token:
    [SEUF](https://huggingface.co/papers/2411.18797) describes how unlearning makes routers choose other experts
    instead of changing those that hold the knowledge. Experts are compared by their number, so A and B should descend
    from one model.

    Args:
        a ([`RoutingSnapshot`]): From [`routing_snapshot`].
        b ([`RoutingSnapshot`]): From [`routing_snapshot`].
        reduce (`bool`, defaults to `False`): Add up what the processes of a distributed run saw. Every process must
            call it then, with snapshots of its own part of the text.

    Returns:
        [`ShiftReport`]

    Raises:
        ValueError: A and B differ in the number of MoE layers or of experts.

    Example:
        ```python
        code = routing_snapshot(model, tokenizer, code_texts, name="code")
        prose = routing_snapshot(model, tokenizer, prose_texts, name="prose")
        routing_shift(code, prose).metrics()["load_shift"]
        ```
    """
    for what, sizes in (("MoE layers", [len(a.layers), len(b.layers)]), *_sizes(a, b)):
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{a.name!r} has {sizes[0]} {what} and {b.name!r} {sizes[1]}: their routing cannot be compared. "
                "Compare models that descend from one another."
            )
    # All processes or none: what is added up must be the same everywhere.
    paired = bool(_added(torch.tensor([float(not torch.equal(a.token_ids, b.token_ids))]), reduce) == 0)
    tokens = _added(torch.tensor([a.num_tokens, b.num_tokens], dtype=torch.float64), reduce).tolist()
    layers = [_layer_shift(one, other, paired, tokens, reduce) for one, other in zip(a.layers, b.layers, strict=True)]
    return ShiftReport(a.name, b.name, int(tokens[0]), int(tokens[1]), paired, layers)


def _sizes(a: RoutingSnapshot, b: RoutingSnapshot) -> Iterable[tuple[str, list[int]]]:
    for one, other in zip(a.layers, b.layers, strict=False):
        yield f"experts in {one.name!r}", [one.num_experts, other.num_experts]


def _layer_shift(a: LayerSnapshot, b: LayerSnapshot, paired: bool, tokens: list[float], reduce: bool) -> LayerShift:
    n = a.num_experts
    counts = torch.stack([expert_counts(layer.index.long(), n) for layer in (a, b)]).double()  # (2, N)
    mass = torch.stack([layer.probabilities.sum(dim=0, dtype=torch.float64) for layer in (a, b)])  # (2, N)
    changes = _token_sums(a, b) if paired else torch.zeros(3, dtype=torch.float64)
    sums = _added(torch.cat([counts.flatten(), mass.flatten(), changes]), reduce)
    counts, mass, changes = sums[: 2 * n].view(2, n), sums[2 * n : 4 * n].view(2, n), sums[4 * n :]
    load = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = mass / torch.tensor(tokens, dtype=torch.float64).clamp(min=1).unsqueeze(-1)
    changes = (changes / max(tokens[0], 1)).tolist() if paired else [None] * 3
    return LayerShift(
        a.name,
        n,
        a.expert_labels,
        load[0].tolist(),
        load[1].tolist(),
        _variation(load[0], load[1]).item(),
        _variation(mean[0], mean[1]).item(),
        *changes,
    )


def _token_sums(a: LayerSnapshot, b: LayerSnapshot) -> torch.Tensor:
    """Sums over tokens of the shares of chosen experts that differ, of another best expert, of the variation."""
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(len(a.index)).split(CHUNK):
        chosen = [_chosen(layer.index[rows].long(), a.num_experts) for layer in (a, b)]  # (T, N)
        common = (chosen[0] & chosen[1]).sum(dim=-1)
        most = torch.maximum(chosen[0].sum(dim=-1), chosen[1].sum(dim=-1))
        p, q = (layer.probabilities[rows].float() for layer in (a, b))
        sums[0] += (1 - common / most.clamp(min=1))[most > 0].sum()
        sums[1] += (p.argmax(dim=-1) != q.argmax(dim=-1)).sum()
        sums[2] += _variation(p, q).sum()
    return sums


def _chosen(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Which experts a token was sent to, `(T, N)`; the last column held the empty slots."""
    chosen = torch.zeros(len(index), num_experts + 1, dtype=torch.bool)
    return chosen.scatter_(1, index, True)[:, :-1]


def _variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p - q).abs().sum(dim=-1) / 2


def _added(values: torch.Tensor, reduce: bool) -> torch.Tensor:
    """The sum over processes, where that is asked for and there are several."""
    if not (reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)  # whatever the backend: NCCL reduces nothing on the CPU
    return torch.stack(parts).sum(dim=0)
