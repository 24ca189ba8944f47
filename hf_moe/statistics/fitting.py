"""What EM and L-BFGS share: their result, and which parameters the density leaves undetermined."""

from dataclasses import dataclass

import torch

from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression


__all__ = ["FitResult", "FreeParameters", "check_data"]


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Args:
        log_likelihoods (`tuple[float, ...]`): Mean log p(y | x) before the first iteration, and after each (EM), or
            after the last alone (L-BFGS).
        iterations (`int`): How many there were.
        converged (`bool`): Whether the tolerance was met before `max_iter`.
    """

    log_likelihoods: tuple[float, ...]
    iterations: int
    converged: bool

    @property
    def log_likelihood(self) -> float:
        """That of the parameters the model now has."""
        return self.log_likelihoods[-1]


@dataclass(frozen=True)
class FreeParameters:
    """Which of the gate's parameters a fit may change.

    A softmax does not see what is added to all scores, so beta0 of the last component stays 0, and with linear scores
    beta1 too.

    Args:
        gate_weight (`torch.Tensor` of shape `(k, d)`): `False` where beta1 is held.
        gate_bias (`torch.Tensor` of shape `(k,)`): `False` where beta0 is held.
    """

    gate_weight: torch.Tensor
    gate_bias: torch.Tensor

    @classmethod
    @torch.no_grad()
    def prepare(cls, model: SoftmaxGaussianMoEForRegression, fix_last_gate: bool | None) -> "FreeParameters":
        """Moves a model to the form described above, which has the same density, and says what is free then.

        Args:
            model ([`SoftmaxGaussianMoEForRegression`]): Changed in place.
            fix_last_gate (`bool`, *optional*): Hold beta1 of the last component. By default where the scores are
                linear; with an activation it is a parameter as any other, and held where it is.

        Raises:
            ValueError: `False` with linear scores.
        """
        linear = model.config.has_linear_scores
        if fix_last_gate is None:
            fix_last_gate = linear
        if linear and not fix_last_gate:
            raise ValueError("`fix_last_gate=False` leaves linear scores undetermined. Leave it out.")
        model.gate_bias.sub_(model.gate_bias[-1].clone())
        if linear:
            model.gate_weight.sub_(model.gate_weight[-1].clone())
        weight = torch.ones_like(model.gate_weight, dtype=torch.bool)
        bias = torch.ones_like(model.gate_bias, dtype=torch.bool)
        bias[-1] = False
        weight[-1] = not fix_last_gate
        return cls(weight, bias)

    def mask(self, model: SoftmaxGaussianMoEForRegression) -> torch.Tensor:
        """Which of all parameters are free, flattened in the model's order, `(p,)`."""
        held = {"gate_weight": self.gate_weight, "gate_bias": self.gate_bias}
        flat = [
            held.get(name, torch.ones_like(parameter, dtype=torch.bool)).flatten()
            for name, parameter in model.named_parameters()
        ]
        return torch.cat(flat)


def check_data(
    model: SoftmaxGaussianMoEForRegression, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x `(n, d)` and y `(n,)` in the model's dtype and on its device.

    Raises:
        ValueError: shapes that do not belong together, no observation, or a number that is not finite.
    """
    x, y = x.to(model.weight), y.to(model.weight).reshape(-1)
    if x.dim() == 1:
        x = x.unsqueeze(-1)
    if x.dim() != 2 or x.shape[-1] != model.config.input_size or len(x) != len(y) or len(y) == 0:
        raise ValueError(
            f"`x` must have shape (n, {model.config.input_size}) and `y` (n,) with n > 0, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("`x` and `y` must be finite: leave rows with NaN or infinity out.")
    return x, y
