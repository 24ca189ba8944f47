"""The result of a routing report: numbers per layer, as JSON, as rows of a table, as a folder with plots.

Shapes: L MoE layers, N experts.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


__all__ = ["REPORT_FILES", "LayerReport", "RoutingReport", "TokenExample", "check_writable"]

REPORT_FILES = ("expert_load.png", "routing_entropy.png", "coactivation.png", "report.json", "report.md")


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


@dataclass
class RoutingReport:
    """How a model routed a text; made by [`routing_report`].

    Args:
        model_name (`str`): What was looked at.
        num_tokens (`int`): Tokens routed, padding excluded.
        layers (`list[LayerReport]`): One per MoE layer.

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

        directory = Path(directory)
        check_writable(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
            drawn = save_plots(self, Path(temporary))
            page = render_markdown(self, plots=drawn)
            Path(temporary, "report.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            Path(temporary, "report.md").write_text(page, encoding="utf-8")
            directory.mkdir(exist_ok=True)
            for name in REPORT_FILES:
                if Path(temporary, name).exists():
                    os.replace(Path(temporary, name), directory / name)
                else:
                    (directory / name).unlink(missing_ok=True)  # a plot of an older report does not belong to this one
        return directory


def check_writable(directory: str | os.PathLike) -> None:
    """Finds out whether a report can be written, without writing.

    Args:
        directory (`str` or `os.PathLike`): Where the report should go; may not exist yet.

    Raises:
        OSError: it is a file, lies below a file, or may not be written.
    """
    directory = Path(directory)
    nearest = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"`output` {str(directory)!r} cannot be a folder: {str(nearest)!r} is a file. Choose another folder."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"`output` {str(directory)!r} cannot be written: no permission in {str(nearest)!r}. Choose another folder."
        )
