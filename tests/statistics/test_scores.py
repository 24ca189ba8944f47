"""Scores in closed form are what automatic differentiation gives; the information has the null space of the theory."""

import pytest
import torch
from common.gaussian_mixtures import TEMPERED, draw

from hf_moe.statistics import fisher_information, observation_scores


FREE = {"learn_temperature": True, "allow_unidentifiable": True}
GATES = [
    {"gate": "dense_to_sparse", **FREE},
    {"gate": "activation", "activation": "gelu", **FREE},
    {"gate": "activation", "activation": "square", **FREE},
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.get("activation", "linear"))
def test_scores_are_the_derivatives(gate):
    model = TEMPERED.to_model(**gate)
    x, y = draw(TEMPERED, 6, -2, 2, **gate)
    scores = observation_scores(model, x, y)
    assert list(scores) == [name for name, _ in model.named_parameters()]
    for row in range(len(x)):
        gradients = torch.autograd.grad(
            model.log_density(x[row : row + 1], y[row : row + 1]).sum(), model.parameters()
        )
        for name, gradient in zip(scores, gradients, strict=True):
            torch.testing.assert_close(scores[name][row], gradient)


# One for beta0 and one for the temperature of homogeneous scores; one for beta1 of linear ones, which may all be
# shifted, or for the last beta1 of others, as it is zero, where their derivative vanishes.
@pytest.mark.parametrize(("activation", "nullity"), [("linear", 3), ("relu", 3), ("square", 3), ("tanh", 1)])
def test_the_information_lacks_what_the_density_does_not_determine(activation, nullity):
    gate = {"gate": "activation", "activation": activation, **FREE}
    x, y = draw(TEMPERED, 20_000, -2, 2, **gate)
    values = torch.linalg.eigvalsh(fisher_information(TEMPERED.to_model(**gate), x, y))
    assert (values < 1e-12).sum() == nullity and values[nullity] > 1e-5
