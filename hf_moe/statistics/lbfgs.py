"""L-BFGS on the exact log-likelihood."""

import torch
from torch import nn

from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression

from .fitting import FitResult, FreeParameters, check_data
from .scores import fisher_information


__all__ = ["fit_lbfgs"]

# Observations from which the scale of the parameters is taken; more would not change the path.
SCALED_BY = 4096
# Directions with less information than this, relative to the most, have none: rounding is not to be magnified.
LEAST_INFORMATION = 1e-10


def fit_lbfgs(
    model: SoftmaxGaussianMoEForRegression,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    max_iter: int = 500,
    tol: float = 1e-6,
    fix_last_gate: bool | None = None,
) -> FitResult:
    """Maximises mean log p(y | x) over the parameters of a model, from where they are.

    All data at once, strong Wolfe line search, in coordinates in which the Fisher information of the start is the
    identity: beta1 and beta0 of a steep gate differ in scale, and hardly in effect, by orders of magnitude. The model
    never ends worse than it began.

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Changed in place.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
        y (`torch.Tensor` of shape `(n,)`): Targets.
        max_iter (`int`, defaults to 500): Iterations at most.
        tol (`float`, defaults to 1e-6): Converged when no entry of the gradient in those coordinates is larger (the
            likelihood is then about `tol` squared below its maximum), or no step gains anything.
        fix_last_gate (`bool`, *optional*): Hold beta1 of the last component; by default where the scores are linear,
            which loses nothing.

    Returns:
        [`FitResult`]

    Raises:
        ValueError: data of other shapes or not finite.

    Example:

    ```python
    >>> fit_lbfgs(model, x, y).log_likelihood
    ```
    """
    x, y = check_data(model, x, y)
    free = FreeParameters.prepare(model, fix_last_gate).mask(model)
    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach().clone()
    directions = _directions(model, x[:SCALED_BY], y[:SCALED_BY], free)  # (p, free)
    coordinates = nn.Parameter(start.new_zeros(directions.shape[1]))
    optimizer = torch.optim.LBFGS(
        [coordinates],
        max_iter=max_iter,
        max_eval=3 * max_iter,
        tolerance_grad=tol,
        tolerance_change=1e-14,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def move() -> None:
        nn.utils.vector_to_parameters(start + directions @ coordinates, parameters)

    def loss() -> torch.Tensor:
        move()
        with torch.enable_grad():
            value = -model.log_density(x, y).mean()
            gradient = torch.autograd.grad(value, parameters)
        coordinates.grad = directions.T @ nn.utils.parameters_to_vector(gradient)
        return value.detach()

    first = -float(optimizer.step(loss))
    move()
    with torch.no_grad():
        last = float(model.log_density(x, y).mean())
    state = optimizer.state[coordinates]
    if not last >= first:  # also where it is not a number
        nn.utils.vector_to_parameters(start, parameters)
        return FitResult((first, first), 0, False)
    converged = state["n_iter"] < max_iter and state["func_evals"] < optimizer.defaults["max_eval"]
    return FitResult((first, last), state["n_iter"], converged)


def _directions(
    model: SoftmaxGaussianMoEForRegression, x: torch.Tensor, y: torch.Tensor, free: torch.Tensor
) -> torch.Tensor:
    """(Fisher information)^(-1/2) of the free parameters, as columns of all, `(p, free)`."""
    information = fisher_information(model, x, y)[free][:, free]
    values, vectors = torch.linalg.eigh(information)
    most = values[-1].clamp(min=1e-30)
    values = torch.where(values < LEAST_INFORMATION * most, most, values)
    directions = information.new_zeros(len(free), len(values))
    directions[free] = vectors / values.sqrt()
    return directions
