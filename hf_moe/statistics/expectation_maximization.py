"""EM: responsibilities, weighted least squares for the experts, a Newton step for the gate.

Shapes: n observations, d inputs, k experts of the mixture, e = d + 1.
"""

import torch

from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression

from .fitting import FitResult, FreeParameters, check_data
from .gate_step import gate_step


__all__ = ["expert_step", "fit_em"]

# Components that answer for fewer observations than this stay as they are: there is nothing to fit them to.
LEAST_MASS = 1e-8


@torch.no_grad()
def fit_em(
    model: SoftmaxGaussianMoEForRegression,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    max_iter: int = 2000,
    tol: float = 1e-6,
    fix_last_gate: bool | None = None,
    search_selection: bool = False,
) -> FitResult:
    """Expectation maximisation from where the parameters of a model are. The log-likelihood never falls.

    As in the experiments of [2309.13850](https://huggingface.co/papers/2309.13850): responsibilities, experts by
    weighted least squares, then the gate, until the mean log-likelihood changes by less than `tol`.

    Note: the gate takes one Newton step per iteration, halved until the log-likelihood does not fall; the papers'
    scripts ascend a quadratic lower bound coordinate by coordinate; it is the same fixed point in fewer steps. The
    top-K selection has no derivative, here as there: an expert enters or leaves it as a consequence of other changes
    only, and with K = 1 the gate does not move at all unless `search_selection`.

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Changed in place.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
        y (`torch.Tensor` of shape `(n,)`): Targets.
        max_iter (`int`, defaults to 2000): Iterations at most.
        tol (`float`, defaults to 1e-6): Converged when the mean log-likelihood changes by less.
        fix_last_gate (`bool`, *optional*): Hold beta1 of the last component; by default where the scores are linear,
            which loses nothing.
        search_selection (`bool`, defaults to `False`): For the top-K gate: where its own step gains nothing, try the
            direction in which it would go if it kept all experts, so that the selection is learned too.

    Returns:
        [`FitResult`]

    Raises:
        ValueError: data of other shapes or not finite.

    Example:

    ```python
    >>> fit_em(model, x, y, max_iter=100).log_likelihoods
    ```
    """
    x, y = check_data(model, x, y)
    free = FreeParameters.prepare(model, fix_last_gate)
    log_joint = model.log_joint(x, y)
    search = search_selection and model.config.gate == "top_k"
    history = [float(log_joint.logsumexp(-1).mean())]
    converged = False
    while len(history) <= max_iter and not converged:
        responsibilities = log_joint.softmax(-1)  # (n, k)
        expert_step(model, x, y, responsibilities)
        gate_step(model, x, model.expert_log_density(x, y), responsibilities, free, search)
        log_joint = model.log_joint(x, y)
        history.append(float(log_joint.logsumexp(-1).mean()))
        converged = abs(history[-1] - history[-2]) < tol
    return FitResult(tuple(history), len(history) - 1, converged)


@torch.no_grad()
def expert_step(
    model: SoftmaxGaussianMoEForRegression, x: torch.Tensor, y: torch.Tensor, responsibilities: torch.Tensor
) -> None:
    """Weighted least squares and weighted residual variance of every expert.

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Changed in place.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
        y (`torch.Tensor` of shape `(n,)`): Targets.
        responsibilities (`torch.Tensor` of shape `(n, k)`): Weight of each observation for each expert.
    """
    design = torch.cat([x, torch.ones_like(x[:, :1])], dim=-1)  # (n, e)
    weighted = responsibilities.unsqueeze(-1) * design.unsqueeze(1)  # (n, k, e)
    gram = torch.einsum("nke,nf->kef", weighted, design)
    moment = torch.einsum("nke,n->ke", weighted, y)
    # The pseudo-inverse, for an expert that answers for fewer observations than it has coefficients.
    found = (torch.linalg.pinv(gram, hermitian=True) @ moment.unsqueeze(-1)).squeeze(-1)  # (k, e)
    current = torch.cat([model.weight, model.bias.unsqueeze(-1)], dim=-1)
    candidates = torch.stack([current, found])  # (2, k, e)
    squares = (y.unsqueeze(-1) - torch.einsum("ne,cke->cnk", design, candidates)).square()
    sums = (responsibilities * squares).sum(1)  # (2, k)
    mass = responsibilities.sum(0)
    # Rounding may leave the solution of an ill-conditioned system behind the coefficients there were.
    better = (sums[1] <= sums[0]) & (mass > LEAST_MASS)
    chosen = torch.where(better.unsqueeze(-1), found, current)
    variance = torch.where(better, sums[1], sums[0]) / mass.clamp(min=LEAST_MASS)
    variance = torch.where(mass > LEAST_MASS, variance.clamp(min=model.config.min_variance), model.variance)
    model.weight.copy_(chosen[:, :-1])
    model.bias.copy_(chosen[:, -1])
    model.log_variance.copy_(variance.log())
