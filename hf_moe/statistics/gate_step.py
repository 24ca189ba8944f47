"""EM's step for the gate: Newton's direction for the weighted logistic regression, shortened until nothing is lost.

Shapes: n observations, d inputs, k experts of the mixture, e = d + 1, p free parameters of the gate.
"""

import torch

from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression

from .fitting import FreeParameters
from .scores import gate_features


__all__ = ["gate_step"]

HALVINGS = 12


@torch.no_grad()
def gate_step(
    model: SoftmaxGaussianMoEForRegression,
    x: torch.Tensor,
    expert_log_density: torch.Tensor,
    responsibilities: torch.Tensor,
    free: FreeParameters,
    search_selection: bool = False,
) -> None:
    """Moves beta1, beta0 and a learned temperature up sum_n sum_i r_ni log pi_i(x_n), by Fisher scoring.

    For linear scores that is Newton's method. The curvature is at most that of the quadratic lower bound of
    [2309.13850](https://huggingface.co/papers/2309.13850)'s scripts, so the step is at least as long as theirs; it is
    halved until the log-likelihood does not fall.

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Changed in place.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
        expert_log_density (`torch.Tensor` of shape `(n, k)`): log N of the experts as they are now.
        responsibilities (`torch.Tensor` of shape `(n, k)`): r, of the experts as they were before.
        free ([`FreeParameters`]): What may move.
        search_selection (`bool`, defaults to `False`): Where that gains nothing, try the direction in which the top-K
            gate would go if it kept all experts.
    """

    def log_likelihood() -> float:
        return float((model.log_gates(x) + expert_log_density).logsumexp(-1).mean())

    names = ["gate_weight", "gate_bias"] + (["log_temperature"] if model.log_temperature is not None else [])
    start = {name: getattr(model, name).clone() for name in names}
    before = log_likelihood()

    def moved(gates: torch.Tensor, responsibilities: torch.Tensor) -> bool:
        direction = _direction(model, x, gates, responsibilities, free)
        # A temperature that nearly cancels would be sent to infinity, whence nothing leads back.
        far = direction["log_temperature"].abs().sum()
        step = 1.0 / max(1.0, float(far))
        for _ in range(HALVINGS):
            for name in names:
                getattr(model, name).copy_(start[name] + step * direction[name])
            if log_likelihood() > before:
                return True
            step /= 2
        for name in names:
            getattr(model, name).copy_(start[name])
        return False

    # Zero where the top-K gate left an expert out, which then has no derivative.
    if not moved(model.log_gates(x).exp(), responsibilities) and search_selection:
        log_gates = model.scores(x).log_softmax(-1)
        moved(log_gates.exp(), (log_gates + expert_log_density).softmax(-1))


def _direction(
    model: SoftmaxGaussianMoEForRegression,
    x: torch.Tensor,
    gates: torch.Tensor,
    responsibilities: torch.Tensor,
    free: FreeParameters,
) -> dict[str, torch.Tensor]:
    """Parameter name to its part of (Fisher information)^-1 gradient; zero where it is held."""
    k, d = model.gate_weight.shape
    residual = responsibilities - gates  # (n, k)
    scores = model.scores(x)
    features = gate_features(model, x)  # (n, k, e), derivatives of a score after its own beta1, beta0
    covariance = torch.diag_embed(gates) - gates.unsqueeze(-1) * gates.unsqueeze(-2)  # (n, k, k)
    spread = torch.einsum("nke,nkl->nkel", features, covariance)
    gradient = torch.einsum("nk,nke->ke", residual, features).reshape(-1)
    information = torch.einsum("nkel,nlf->kelf", spread, features).reshape(k * (d + 1), -1)
    free_entries = torch.cat([free.gate_weight, free.gate_bias.unsqueeze(-1)], dim=-1).reshape(-1)
    if model.log_temperature is not None:  # d score / d log temperature = -score
        cross = -torch.einsum("nkel,nl->ke", spread, scores).reshape(-1, 1)
        corner = torch.einsum("nk,nkl,nl->", scores, covariance, scores).reshape(1, 1)
        information = torch.cat([torch.cat([information, cross], 1), torch.cat([cross.T, corner], 1)])
        gradient = torch.cat([gradient, -(residual * scores).sum().reshape(1)])
        free_entries = torch.cat([free_entries, free_entries.new_ones(1)])
    found = torch.zeros_like(gradient)
    chosen = information[free_entries][:, free_entries]
    found[free_entries] = torch.linalg.pinv(chosen, hermitian=True) @ gradient[free_entries]
    own = found[: k * (d + 1)].reshape(k, d + 1)
    return {"gate_weight": own[:, :-1], "gate_bias": own[:, -1], "log_temperature": found[k * (d + 1) :]}
