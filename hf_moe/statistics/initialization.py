"""Where a search for the best fit begins, when nobody knows the truth."""

import torch

from hf_moe.models.softmax_gaussian_moe import SoftmaxGaussianMoEConfig
from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression

from .expectation_maximization import expert_step, fit_em
from .parameters import GaussianMoEParameters


__all__ = ["move_to", "search_start"]

# Iterations of EM after which the starts are compared, and of k-means before it.
TRIAL, LLOYD = 50, 10


@torch.no_grad()
def search_start(
    model: SoftmaxGaussianMoEForRegression,
    x: torch.Tensor,
    y: torch.Tensor,
    num_starts: int,
    generator: torch.Generator,
) -> None:
    """Sets a model to the best of several random starts, each improved by a few iterations of EM.

    A start clusters (x, y) by k-means and fits one expert to each cluster. For the top-K gate the trials keep all
    experts: which of them are kept has no derivative to follow, so it is better nearly right from the beginning.

    Args:
        model ([`SoftmaxGaussianMoEForRegression`]): Changed in place.
        x (`torch.Tensor` of shape `(n, d)`): Inputs.
        y (`torch.Tensor` of shape `(n,)`): Targets.
        num_starts (`int`): How many.
        generator (`torch.Generator`): CPU generator.
    """
    dense = model
    if model.config.gate == "top_k":
        fields = ("num_components", "input_size", "min_variance")
        config = SoftmaxGaussianMoEConfig(**{name: getattr(model.config, name) for name in fields})
        dense = SoftmaxGaussianMoEForRegression(config)
        move_to(dense, model.device)
    found = []
    for _ in range(num_starts):
        _random_start(dense, x, y, generator)
        value = fit_em(dense, x, y, max_iter=TRIAL).log_likelihood
        found.append((value, GaussianMoEParameters.of(dense)))
    max(found, key=lambda pair: pair[0])[1].write_to(model)


def move_to(model: SoftmaxGaussianMoEForRegression, device: torch.device | str) -> None:
    """Moves a model in place, keeping its dtype."""
    torch.nn.Module.to(model, device=device)


def _random_start(
    model: SoftmaxGaussianMoEForRegression, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> None:
    points = torch.cat([x, y.unsqueeze(-1)], dim=-1)
    points = (points - points.mean(0)) / points.std(0, correction=0).clamp(min=1e-12)
    labels = _kmeans(points, model.config.num_components, generator)
    responsibilities = torch.nn.functional.one_hot(labels, model.config.num_components).to(x)
    # A small share of everything: clusters of one point would start with no variance.
    responsibilities = 0.9 * responsibilities + 0.1 / model.config.num_components
    model.weight.zero_()
    model.bias.fill_(y.mean())
    model.log_variance.fill_(y.var(correction=0).clamp(min=model.config.min_variance).log())
    model.gate_bias.zero_()
    if model.log_temperature is not None:
        model.log_temperature.zero_()
    # Not zero, where some activations have no derivative, and in the units of x.
    noise = torch.randn(model.gate_weight.shape, generator=generator, dtype=torch.float64).to(x)
    model.gate_weight.copy_(0.1 * noise / x.std(0, correction=0).clamp(min=1e-12))
    expert_step(model, x, y, responsibilities)


def _kmeans(points: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Cluster of each point, from k-means++ seeds."""
    chosen = torch.randint(len(points), (1,), generator=generator)
    centers = points[chosen]
    for _ in range(num_clusters - 1):
        distance = torch.cdist(points, centers).square().amin(-1).cpu()
        # Where all points coincide with a seed, any is as good.
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)
        place = torch.rand(1, generator=generator, dtype=weights.dtype) * weights.sum()
        index = torch.searchsorted(weights.cumsum(0), place).clamp(max=len(points) - 1)
        centers = torch.cat([centers, points[index]])
    labels = torch.cdist(points, centers).argmin(-1)
    for _ in range(LLOYD):
        counts = torch.bincount(labels, minlength=num_clusters).to(points)
        sums = torch.zeros_like(centers).index_add_(0, labels, points)
        centers = torch.where(counts.unsqueeze(-1) > 0, sums / counts.clamp(min=1).unsqueeze(-1), centers)
        labels = torch.cdist(points, centers).argmin(-1)
    return labels
