"""The result of a routing report: numbers per layer, as JSON, as rows of a table, as a folder with plots.

Shapes: L MoE layers, N experts.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .folder import replace_files
from .groups import weighted_shift


__all__ = ["REPORT_FILES", "LayerReport", "RoutingReport", "TokenExample"]

REPORT_FILES = (
    "expert_load.png",
    "routing_entropy.png",
    "coactivation.png",
    "token_classes.png",
    "positions.png",
    "report.json",
    "report.md",
)


class TokenExample(NamedTuple):
    """A token typical of an expert.

    Args:
        text (`str`): The token, decoded.
        token_id (`int`): Its id.
        count (`int`): How often the expert received it.
        share (`float`): `count` / occurrences of the token.

    Example:
        ```python
        report.layers[0].examples[3][0].text  # what expert 3 of the first MoE layer is most for
        ```
    """

    text: str
    token_id: int
    count: int
    share: float


@dataclass
class LayerReport:
    """Routing of one MoE layer over the whole text.

    Args:
        name (`str`): Path of the block in the model.
        num_experts (`int`): N, zero-computation experts included.
        num_experts_per_tok (`int`): K.
        expert_labels (`list[str]`): A short name per expert.
        counts (`list[int]`): Assignments per expert.
        load (`list[float]`): Share of assignments per expert, sum 1.
        entropy (`float`): Mean over tokens of the entropy of the router's distribution, in nats.
        marginal_entropy (`float`): Entropy of the mean distribution, in nats.
        max_violation (`float`): Load of the busiest expert over the mean load, minus 1.
        dead_experts (`list[int]`): Experts that received no token.
        active_experts (`float`): Mean number of experts a token was sent to.
        active_computing_experts (`float`): The same without zero-computation experts.
        coactivation (`list[list[int]]`): `[i][j]`: tokens that both experts processed.
        examples (`list[list[TokenExample]]`): Typical tokens of each expert.
        class_load (`dict[str, list[float]]`): Class of tokens to the share of its assignments per expert.
        position_load (`dict[str, list[float]]`): The same for bins of positions in a window.

    Example:
        ```python
        max(report.layers, key=lambda layer: layer.max_violation).name  # the least balanced layer
        ```
    """

    name: str
    num_experts: int
    num_experts_per_tok: int
    expert_labels: list[str]
    counts: list[int]
    load: list[float]
    entropy: float
    marginal_entropy: float
    max_violation: float
    dead_experts: list[int]
    active_experts: float
    active_computing_experts: float
    coactivation: list[list[int]]
    examples: list[list[TokenExample]] = field(default_factory=list)
    class_load: dict[str, list[float]] = field(default_factory=dict)
    position_load: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class RoutingReport:
    """How a model routed a text; made by [`routing_report`].

    Args:
        model_name (`str`): What was looked at.
        num_tokens (`int`): Tokens routed, padding excluded.
        layers (`list[LayerReport]`): One per MoE layer.
        token_classes (`dict[str, int]`): Class to its number of tokens.
        positions (`dict[str, int]`): Bin of positions to its number of tokens.
        flops_per_token (`float`, *optional*): Floating-point operations of a token's forward pass, experts counted
            that it was sent to; see [`~hf_moe.active_compute.ActiveCompute`] for what is counted.
        flops_share (`float`, *optional*): Their share of what all experts would cost.

    Example:
        ```python
        report = routing_report(model, tokenizer, texts)
        report.save("report")
        report.table()
        ```
    """

    model_name: str
    num_tokens: int
    layers: list[LayerReport]
    token_classes: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    flops_per_token: float | None = None
    flops_share: float | None = None

    def class_shift(self, layer: LayerReport) -> float:
        """How much the class of a token says about its expert: share of the assignments that would have to move for
        every class to be routed like the whole text, 0 to 1.

        Args:
            layer ([`LayerReport`]): A layer of this report.
        """
        return weighted_shift(layer.class_load, self.token_classes, layer.load)

    def position_shift(self, layer: LayerReport) -> float:
        """The same for the position in the window.

        Args:
            layer ([`LayerReport`]): A layer of this report.
        """
        return weighted_shift(layer.position_load, self.positions, layer.load)

    def metrics(self) -> dict[str, float]:
        """Means over layers, in the names of [`hf_moe.metrics`]; for a log or a card."""

        def mean(values) -> float:
            values = list(values)
            return sum(values) / len(values)

        return {
            "routing_entropy": mean(layer.entropy for layer in self.layers),
            "marginal_entropy": mean(layer.marginal_entropy for layer in self.layers),
            "max_violation": mean(layer.max_violation for layer in self.layers),
            "dead_share": mean(len(layer.dead_experts) / layer.num_experts for layer in self.layers),
            "active_experts": mean(layer.active_experts for layer in self.layers),
            "class_shift": mean(self.class_shift(layer) for layer in self.layers),
            "position_shift": mean(self.position_shift(layer) for layer in self.layers),
        }

    def table(self) -> list[dict[str, str | int]]:
        """One row per MoE layer, ready to print: column name to value."""
        rows = []
        for layer in self.layers:
            busiest = max(range(layer.num_experts), key=layer.load.__getitem__)
            row: dict[str, str | int] = {
                "Layer": layer.name,
                "Experts": layer.num_experts,
                "Active per token": f"{layer.active_experts:.2f}",
                "Busiest expert": f"{layer.expert_labels[busiest]} ({layer.load[busiest]:.0%})",
                "Max violation": f"{layer.max_violation:.2f}",
                "Entropy (nats)": f"{layer.entropy:.3f}",
                "Entropy of the mean": f"{layer.marginal_entropy:.3f}",
                "Dead experts": len(layer.dead_experts),
                "Shift by class": f"{self.class_shift(layer):.2f}",
                "Shift by position": f"{self.position_shift(layer):.2f}",
            }
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        content = {**asdict(self), "metrics": self.metrics()}
        for layer, source in zip(content["layers"], self.layers, strict=True):
            layer["examples"] = [[example._asdict() for example in expert] for expert in source.examples]
        return content

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `report.md`, `report.json` and the plots. Everything is drawn first and then renamed into place, so a
        failure leaves an older report as it was.

        Args:
            directory (`str` or `os.PathLike`): Created if missing. Other files in it stay.

        Returns:
            `Path`: `directory`.

        Raises:
            OSError: `directory` cannot be written.
            ImportError: matplotlib is not installed.
        """
        from .markdown import render_markdown
        from .plots import save_plots

        with replace_files(directory, REPORT_FILES) as temporary:
            page = render_markdown(self, plots=save_plots(self, temporary))
            (temporary / "report.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            (temporary / "report.md").write_text(page, encoding="utf-8")
        return Path(directory)
