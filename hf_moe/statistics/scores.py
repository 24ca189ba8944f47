"""Scores (derivatives of each observation's log-likelihood) and the Fisher information, in closed form.

Shapes: n observations, d inputs, k experts of the mixture, e = d + 1, p parameters.
"""

import torch

from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression


__all__ = ["fisher_information", "gate_features", "observation_scores"]


@torch.no_grad()
def observation_scores(
    model: SoftmaxGaussianMoEForRegression, x: torch.Tensor, y: torch.Tensor
) -> dict[str, torch.Tensor]:
    """d log p(y | x) / d parameter of every observation.

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Where.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
        y (`torch.Tensor` of shape `(n,)`): Targets.

    Returns:
        `dict[str, torch.Tensor]`: Parameter name to `(n, *shape)`, in the order of the model's parameters.

    Example:

    ```python
    >>> observation_scores(model, x, y)["weight"].mean(0)  # zero at the maximum
    ```
    """
    log_gates = model.log_gates(x)
    responsibilities = (log_gates + model.expert_log_density(x, y)).softmax(-1)  # (n, k)
    surplus = responsibilities - log_gates.exp()
    variance = model.variance
    standardised = (y.unsqueeze(-1) - model.expert_means(x)) / variance
    gates = surplus.unsqueeze(-1) * gate_features(model, x)  # (n, k, e)
    slopes = responsibilities * standardised
    spread = responsibilities * (standardised.square() * variance - 1) / 2
    scores = {
        "gate_weight": gates[..., :-1],
        "gate_bias": gates[..., -1],
        "weight": slopes.unsqueeze(-1) * x.unsqueeze(1),
        "bias": slopes,
        "log_variance": spread * (variance > model.config.min_variance),
    }
    if model.log_temperature is not None:
        scores["log_temperature"] = -(surplus * model.scores(x)).sum(-1, keepdim=True)
    return scores


def fisher_information(model: SoftmaxGaussianMoEForRegression, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean outer product of the scores, `(p, p)`, parameters flattened in the model's order.

    Its null space is what the density leaves undetermined: what a softmax does not see, and a temperature that is
    learned with homogeneous scores ([2401.13875](https://huggingface.co/papers/2401.13875)).

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Where.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
        y (`torch.Tensor` of shape `(n,)`): Targets, drawn from the model for the information itself.

    Returns:
        `torch.Tensor` of shape `(p, p)`

    Example:

    ```python
    >>> torch.linalg.eigvalsh(fisher_information(model, x, model.sample(x)))
    ```
    """
    scores = observation_scores(model, x, y)
    flat = torch.cat([values.flatten(1) for values in scores.values()], dim=-1)
    return flat.T @ flat / len(flat)


def gate_features(model: SoftmaxGaussianMoEForRegression, x: torch.Tensor) -> torch.Tensor:
    """d score_i / d (beta1_i, beta0_i), `(n, k, e)`.

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Where.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
    """
    if model.config.has_linear_scores:
        slope = x.new_ones(len(x), model.config.num_components)
    else:
        with torch.enable_grad():
            inner = (x @ model.gate_weight.detach().T).requires_grad_()
            (slope,) = torch.autograd.grad(model.activation(inner).sum(), inner)
    own = torch.cat([slope.unsqueeze(-1) * x.unsqueeze(1), torch.ones_like(slope).unsqueeze(-1)], dim=-1)
    return own / model.temperature.detach()
