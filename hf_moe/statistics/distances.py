"""Errors of a fit beside the Voronoi losses: of the density, and of each kind of parameter.

Shapes: B observations, d inputs, k experts of the mixture.
"""

import torch

from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression

from .parameters import GaussianMoEParameters
from .voronoi import match_components


__all__ = ["hellinger_distance", "parameter_errors"]


@torch.no_grad()
def hellinger_distance(
    fitted: SoftmaxGaussianMoEForRegression,
    true: SoftmaxGaussianMoEForRegression,
    x: torch.Tensor,
    generator: torch.Generator | None = None,
) -> float:
    """Distance of two densities: root of the mean over x of h^2 = 1/2 int (sqrt p(y | x) - sqrt q(y | x))^2 dy.

    Note: estimated with one y per x, from one density for the first half of x and from the other for the second.
    Taken from one alone, what the other has elsewhere would be missed, and with top-K gates they may not overlap.

    Args:
        fitted, true ([`SoftmaxGaussianMoEForRegression`]): Models of the same inputs.
        x (`torch.Tensor` of shape `(B, d)`): Where to compare, in random order.
        generator (`torch.Generator`, *optional*): Of the y.

    Returns:
        `float`: From 0 to 1.

    Example:

    ```python
    >>> hellinger_distance(model, true_model, torch.rand(10_000, 1))
    ```
    """
    x = x.to(true.weight)
    first = x[: len(x) // 2]
    y = torch.cat([true.sample(first, generator), fitted.sample(x[len(first) :], generator)])
    log_p, log_q = fitted.log_density(x, y), true.log_density(x, y)
    log_mixture = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    roots = ((log_p - log_mixture) / 2).exp() - ((log_q - log_mixture) / 2).exp()
    return float((roots.square().mean() / 2).sqrt())


def parameter_errors(fitted: GaussianMoEParameters, true: GaussianMoEParameters) -> dict[str, float]:
    """Mean Euclidean error over the experts of each kind of parameter, and |d temperature|.

    Args:
        fitted ([`GaussianMoEParameters`]): k experts, in any order.
        true ([`GaussianMoEParameters`]): m <= k experts; each is compared with the one it is paired with.

    Returns:
        `dict[str, float]`: `gate_weight`, `gate_bias`, `weight`, `bias`, `variance`, `temperature`.

    Raises:
        ValueError: fewer fitted than true experts.
        ImportError: scipy is missing.

    Example:

    ```python
    >>> parameter_errors(GaussianMoEParameters.of(model), true)["gate_weight"]
    ```
    """
    matched = match_components(fitted, true)
    errors = {}
    for name in ("gate_weight", "gate_bias", "weight", "bias", "variance"):
        difference = (getattr(matched, name) - getattr(true, name)).reshape(true.num_components, -1)
        errors[name] = float(difference.norm(dim=-1).mean())
    return {**errors, "temperature": abs(fitted.temperature - true.temperature)}
