"""One experiment on rates of convergence: a truth, what is fitted to samples of it, and which errors are measured.

Shapes: n observations, d inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression

from .distances import hellinger_distance, parameter_errors
from .expectation_maximization import fit_em
from .lbfgs import fit_lbfgs
from .parameters import GaussianMoEParameters
from .voronoi import align_gate, voronoi_loss


__all__ = ["RateExperiment"]

METHODS = {"em": fit_em, "lbfgs": fit_lbfgs}
INPUTS = ("uniform", "normal")
PARAMETERS = ("gate_weight", "gate_bias", "weight", "bias", "variance", "temperature")
ERRORS = ("D1", "D2", "density", *PARAMETERS)
# The density is compared at this many inputs, whatever n.
COMPARED = 20_000


@dataclass(frozen=True, kw_only=True)
class RateExperiment:
    """Draw data from a truth, fit from near the truth, measure: as in the papers' simulations.

    A fit starts at the truth plus noise, but for the gate of the last expert, which is known: the question is how fast
    the best estimate converges, not whether a search finds it. More fitted than true components are copies of randomly
    chosen ones, which share their mass.

    Note: each repetition draws its own data. 2309.13850's script draws them with one seed, so that its repetitions
    differ by the start alone.

    Args:
        name (`str`): For tables and plots.
        truth ([`GaussianMoEParameters`]): True parameters.
        true_gate (`Mapping`): Gate fields of [`SoftmaxGaussianMoEConfig`] for the truth.
        fitted_gate (`Mapping`, *optional*): The same of what is fitted; those of the truth by default.
        num_components (`int`, *optional*): Experts to fit; those of the truth by default.
        errors (`tuple[str, ...]`): Of `"D1"`, `"D2"`, `"density"` (Hellinger distance), and the parameters
            `"gate_weight"`, `"gate_bias"`, `"weight"`, `"bias"`, `"variance"`, `"temperature"`.
        theory (`Mapping[str, float]`): Error to the slope that the paper proves, where it proves one.
        inputs (`str`, defaults to `"uniform"`): Distribution of x; `"normal"` is N(0, 1).
        input_range (`tuple[float, float]`, defaults to `(0, 1)`): Of uniform inputs.
        jitter (`float`, defaults to 0.005): Standard deviation of the start around the truth at n = 1 ...
        jitter_power (`float`, defaults to 0.083): ... which falls as n to the minus this.
        method (`str`, defaults to `"lbfgs"`): Or `"em"`.
        options (`Mapping`, *optional*): Keyword arguments of [`fit_lbfgs`] or [`fit_em`].

    Raises:
        ValueError: an unknown error, method or distribution, or fewer fitted than true experts.

    Example:

    ```python
    >>> experiment.run(1000, repetition=0)  # {"D1": ...}
    ```
    """

    name: str
    truth: GaussianMoEParameters
    true_gate: Mapping[str, Any]
    fitted_gate: Mapping[str, Any] | None = None
    num_components: int | None = None
    errors: tuple[str, ...] = ("D1", "density")
    theory: Mapping[str, float] = field(default_factory=dict)
    inputs: str = "uniform"
    input_range: tuple[float, float] = (0.0, 1.0)
    jitter: float = 0.005
    jitter_power: float = 0.083
    method: str = "lbfgs"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, allowed in (("method", tuple(METHODS)), ("inputs", INPUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        if unknown := [error for error in self.errors if error not in ERRORS]:
            raise ValueError(f"`errors` has {unknown}; known are {list(ERRORS)}.")
        if self.num_components is not None and self.num_components < self.truth.num_components:
            raise ValueError(
                f"`num_components` must be at least the {self.truth.num_components} of the truth, got "
                f"{self.num_components}."
            )
        self.true_model()
        self.start(1, torch.Generator())

    def true_model(self) -> SoftmaxGaussianMoEForRegression:
        """What data are drawn from."""
        return self.truth.to_model(**self.true_gate)

    def draw_inputs(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """x, `(n, d)` in float64."""
        shape = (size, self.truth.input_size)
        if self.inputs == "normal":
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        low, high = self.input_range
        return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low

    def start(self, size: int, generator: torch.Generator) -> SoftmaxGaussianMoEForRegression:
        """The model a fit to n observations begins with."""
        m = self.truth.num_components
        extra = torch.randint(m, ((self.num_components or m) - m,), generator=generator)
        # The true experts come last: so the last one, whose gate is held at zero, is the truth's last one.
        order = torch.cat([extra, torch.arange(m)])
        chosen = self.truth.permuted(order)
        share = torch.bincount(order)[order].double().log() * self.truth.temperature
        scale = self.jitter * size**-self.jitter_power

        def noise(tensor: torch.Tensor) -> torch.Tensor:
            return scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

        gate_weight, gate_bias = noise(chosen.gate_weight), noise(chosen.gate_bias)
        gate_weight[-1], gate_bias[-1] = 0.0, 0.0  # known, as all others are relative to it
        start = replace(
            chosen,
            gate_weight=chosen.gate_weight + gate_weight,
            gate_bias=chosen.gate_bias - share + gate_bias,
            weight=chosen.weight + noise(chosen.weight),
            bias=chosen.bias + noise(chosen.bias),
            variance=chosen.variance + noise(chosen.variance).abs(),
        )
        gate = self.true_gate if self.fitted_gate is None else self.fitted_gate
        return start.to_model(**gate)

    def run(self, size: int, repetition: int, seed: int = 0) -> dict[str, float]:
        """Draws n observations, fits, and measures.

        Args:
            size (`int`): n.
            repetition (`int`): Chooses data and start, together with `seed` and `size`.
            seed (`int`, defaults to 0): Of the whole study.

        Returns:
            `dict[str, float]`: Error to value.
        """
        state = np.random.SeedSequence([seed, size, repetition]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        truth, x = self.true_model(), self.draw_inputs(size, generator)
        y = truth.sample(x, generator)
        model = self.start(size, generator)
        METHODS[self.method](model, x, y, **self.options)
        return self.measure(model, truth, generator)

    def measure(
        self,
        model: SoftmaxGaussianMoEForRegression,
        truth: SoftmaxGaussianMoEForRegression,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """The errors of a fitted model."""
        fitted = align_gate(GaussianMoEParameters.of(model), self.truth, model.config.has_linear_scores)
        measured = {}
        for kind in ("D1", "D2"):
            if kind in self.errors:
                measured[kind] = voronoi_loss(fitted, self.truth, kind, self.true_gate.get("top_k"))
        if "density" in self.errors:
            x = self.draw_inputs(COMPARED, generator)
            measured["density"] = hellinger_distance(model, truth, x, generator)
        if any(error in PARAMETERS for error in self.errors):
            measured.update(parameter_errors(fitted, self.truth))
        return {error: measured[error] for error in self.errors}
