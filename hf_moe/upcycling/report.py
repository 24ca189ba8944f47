"""What an upcycling run promises and what was measured."""

from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_moe.modes import eval_mode


__all__ = ["ExactnessReport", "MeasuredGap", "UpcycleReport", "count_parameters", "measure_gap"]

# Largest |difference| that counts as rounding, relative to the largest |logit| (at least 1), for exact recipes.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
# What is compared: the first of these that the dense model returns.
OUTPUTS = ("logits", "start_logits", "prediction_logits", "last_hidden_state")


@dataclass(frozen=True)
class MeasuredGap:
    """Difference between the outputs of the dense model and the result.

    Args:
        max_difference (`float`): Largest |difference|.
        mean_difference (`float`): Mean |difference|.
        largest (`float`): Largest |value| of the dense model, for scale.
        num_tokens (`int`): Tokens compared.
        tokens (`str`): `"calibration"` or `"random"`.
        output (`str`): `"logits"`, or `"last_hidden_state"` for models without a head.
        dtype (`str`): Precision of the comparison.
    """

    max_difference: float
    mean_difference: float
    largest: float
    num_tokens: int
    tokens: str
    output: str
    dtype: str

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is no more than rounding."""
        limit = ROUNDING.get(getattr(torch, self.dtype), 5e-2)
        return self.max_difference <= limit * max(1.0, self.largest)


@torch.no_grad()
def measure_gap(
    dense: PreTrainedModel, moe: PreTrainedModel, batches: list[dict[str, torch.Tensor]], tokens: str
) -> MeasuredGap:
    """Runs both models in evaluation mode and compares; padding is left out.

    Args:
        dense, moe (`PreTrainedModel`): The two models.
        batches (`list[dict]`): Model inputs.
        tokens (`str`): What they are, for the report.

    Returns:
        [`MeasuredGap`]
    """
    largest = highest = total = 0.0
    count = values = 0
    output = "logits"
    with eval_mode(dense), eval_mode(moe):
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            ours, theirs = (
                m(**{k: v.to(m.device) for k, v in inputs.items()}, return_dict=True) for m in (moe, dense)
            )
            output = next(name for name in OUTPUTS if name in theirs)
            reference = theirs[output].float()
            # Where the residual stream itself was widened, it begins with the coordinates it had.
            difference = (ours[output][..., : reference.shape[-1]].to(reference.device).float() - reference).abs()
            mask = inputs.get("attention_mask")
            if mask is not None and mask.shape == difference.shape[:2]:
                difference, reference = (x[mask.bool().to(x.device)] for x in (difference, reference))
            highest = max(highest, float(difference.max()))
            largest = max(largest, float(reference.abs().max()))
            total += float(difference.sum(dtype=torch.float64))
            values += difference.numel()
            count += batch["input_ids"].numel() if mask is None else int(mask.sum())
    dtype = str(dense.dtype).removeprefix("torch.")
    return MeasuredGap(highest, total / max(values, 1), largest, count, tokens, output, dtype)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters and their bytes, tied ones once."""
    parameters = list(model.parameters())  # `parameters` itself leaves out duplicates
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


class ExactnessReport:
    """What reports on a conversion share: a verdict on exactness, and facts as a table."""

    predicted_exact: bool
    reason: str
    measured: MeasuredGap | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(cast(Any, self))

    @property
    def verdict(self) -> str:
        """One sentence on exactness: the prediction and the measurement."""
        said = "the same function as the dense model" if self.predicted_exact else "not exactly the dense model"
        text = f"{said} ({self.reason})"
        if self.measured is None:
            return f"{text}; not measured"
        gap = self.measured
        return (
            f"{text}; measured max |Δ{gap.output}| {gap.max_difference:.2g} on {gap.num_tokens} {gap.tokens} tokens "
            f"in {gap.dtype} (largest |{gap.output}| {gap.largest:.3g})"
        )

    def rows(self) -> list[tuple[str, str]]:
        """The facts as name and text."""
        raise TypeError(f"{type(self).__name__} must define `rows`.")

    def to_markdown(self) -> str:
        """A two-column table."""
        lines = ["| | |", "|---|---|"]
        lines += [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in self.rows()]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.rows())


@dataclass
class UpcycleReport(ExactnessReport):
    """Result of [`upcycle`]: print it, save it, or put it in the model card.

    Args:
        source (`str`): Name of the dense model.
        target (`str`): Kind of result.
        architecture (`str`): Class of the result.
        num_experts, num_experts_per_tok (`int`): N and K.
        num_layers (`int`): Layers of the model.
        predicted_exact (`bool`): Whether the result should equal the dense model up to rounding.
        reason (`str`): Why, or why not.
        scale (`float`): Factor folded into the experts.
        recipe (`dict`): Expert builder, router start, weight rule, shared part.
        seed (`int`): Seed.
        dense_parameters, parameters, active_parameters (`int`): Of the source; of the result; used per token.
        num_bytes (`int`): Memory of the result's parameters.
        measured ([`MeasuredGap`], *optional*): `None` with `check=False`.
        layers (`list[dict]`): One entry per MoE layer: index, module, expert width, scale.
    """

    source: str
    target: str
    architecture: str
    num_experts: int
    num_experts_per_tok: int
    num_layers: int
    predicted_exact: bool
    reason: str
    scale: float
    recipe: dict[str, Any]
    seed: int
    dense_parameters: int
    parameters: int
    active_parameters: int
    num_bytes: int
    measured: MeasuredGap | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        layers = [entry["layer"] for entry in self.layers]
        which = "all" if len(layers) == self.num_layers else ", ".join(map(str, layers))
        return [
            ("Source", f"{self.source} ({self.dense_parameters:,} parameters)"),
            ("Result", f"{self.architecture} (target {self.target})"),
            ("Function", self.verdict),
            ("Experts", f"{self.num_experts}, {self.num_experts_per_tok} per token"),
            ("MoE layers", f"{len(layers)} of {self.num_layers} ({which})"),
            ("Expert builder", _call(self.recipe["experts"])),
            ("Router start", _call(self.recipe["router"])),
            ("Shared part", str(self.recipe["shared"] or "none")),
            ("Weights", f"{self.recipe['weights']}, scale {self.scale:g}"),
            ("Parameters", f"{self.parameters:,} ({self.active_parameters:,} active per token)"),
            ("Size", f"{self.num_bytes / 2**20:,.1f} MiB"),
            ("Seed", str(self.seed)),
        ]


def _call(description: dict[str, Any]) -> str:
    parameters = {k: v for k, v in description.items() if k not in ("name", "prompts") and v is not None}
    return f"{description['name']}({', '.join(f'{k}={v}' for k, v in parameters.items())})"
