"""The density: gates that are each other's special cases, invariances, and what can be estimated at all."""

import math

import pytest
import torch
from common.gaussian_mixtures import TEMPERED, TWO_LINES, draw
from torch.func import functional_call, jacrev, vmap

from hf_moe import SoftmaxGaussianMoEConfig, SoftmaxGaussianMoEForRegression
from hf_moe.statistics import GaussianMoEParameters


CURVED = ["sigmoid", "tanh", "gelu", "silu"]
FREE = {"learn_temperature": True, "allow_unidentifiable": True}


def random_parameters(k, d, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((k, d), k, (k, d), k, k)]
    return GaussianMoEParameters(*numbers[:4], numbers[4].exp(), temperature)


def gate_for(activation):
    if activation is None:
        return {"gate": "dense_to_sparse"}
    return {"gate": "activation", "activation": activation}


def test_the_density_is_that_of_the_formula():
    parameters = random_parameters(3, 2, temperature=0.7)
    x, y = draw(parameters, 5, gate="activation")
    model = parameters.to_model(gate="activation")
    scores = (torch.tanh(x @ parameters.gate_weight.T) + parameters.gate_bias) / 0.7
    means = x @ parameters.weight.T + parameters.bias
    densities = torch.distributions.Normal(means, parameters.variance.sqrt()).log_prob(y[:, None]).exp()
    expected = (scores.softmax(-1) * densities).sum(-1).log()
    torch.testing.assert_close(model.log_density(x, y), expected, rtol=1e-12, atol=1e-12)
    outputs = model(x, labels=y)
    torch.testing.assert_close(outputs.loss, -expected.mean())
    torch.testing.assert_close(outputs.mean, (scores.softmax(-1) * means).sum(-1))
    assert outputs.expert_means.shape == outputs.expert_variances.shape == outputs.gates.shape == (5, 3)
    assert len(model(x, return_dict=False)) == 4


def test_the_density_integrates_to_one():
    parameters = random_parameters(3, 1)
    y = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    for gate in ({"gate": "softmax"}, {"gate": "top_k", "top_k": 2}):
        density = parameters.to_model(**gate).log_density(torch.full((len(y), 1), 0.3), y).exp()
        assert torch.trapezoid(density, y).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("activation", [None, "linear", "relu"])
def test_scaling_gate_and_temperature_together_changes_nothing(activation):
    x, y = draw(TEMPERED, 500, -2, 2, gate="dense_to_sparse")
    scaled = GaussianMoEParameters(
        3 * TEMPERED.gate_weight, 3 * TEMPERED.gate_bias, TEMPERED.weight, TEMPERED.bias, TEMPERED.variance, 2.4
    )
    densities = [p.to_model(**gate_for(activation)).log_density(x, y) for p in (TEMPERED, scaled)]
    assert (densities[0] - densities[1]).abs().max() < 1e-13


def test_of_squared_scores_the_weights_scale_with_the_root():
    x, y = draw(TEMPERED, 500, -2, 2, gate="dense_to_sparse")
    scaled = GaussianMoEParameters(
        math.sqrt(3) * TEMPERED.gate_weight, 3 * TEMPERED.gate_bias, TEMPERED.weight, TEMPERED.bias, TEMPERED.variance,
        2.4,
    )  # fmt: skip
    densities = [p.to_model(**gate_for("square")).log_density(x, y) for p in (TEMPERED, scaled)]
    assert (densities[0] - densities[1]).abs().max() < 1e-13


@pytest.mark.parametrize("activation", CURVED)
def test_with_a_curved_activation_it_is_another_density(activation):
    x, y = draw(TEMPERED, 500, -2, 2, gate="dense_to_sparse")
    scaled = GaussianMoEParameters(
        3 * TEMPERED.gate_weight, 3 * TEMPERED.gate_bias, TEMPERED.weight, TEMPERED.bias, TEMPERED.variance, 2.4
    )
    densities = [p.to_model(**gate_for(activation)).log_density(x, y) for p in (TEMPERED, scaled)]
    assert 0.1 < (densities[0] - densities[1]).abs().max() < 1.5


def test_keeping_all_experts_is_the_softmax_gate_bit_by_bit():
    parameters = random_parameters(4, 2)
    x, y = draw(parameters, 50)
    top_k, softmax = parameters.to_model(gate="top_k", top_k=4), parameters.to_model(gate="softmax")
    assert torch.equal(top_k.log_density(x, y), softmax.log_density(x, y))


def test_top_k_keeps_the_k_largest_and_renormalises():
    parameters = random_parameters(4, 2)
    x, _ = draw(parameters, 50)
    gates = parameters.to_model(gate="top_k", top_k=2)(x).gates
    full = parameters.to_model(gate="softmax")(x).gates
    kept = full >= full.topk(2).values[:, -1:]
    assert (gates > 0).sum(-1).eq(2).all()
    torch.testing.assert_close(gates, full * kept / (full * kept).sum(-1, keepdim=True))


def test_a_temperature_of_zero_would_be_the_top_1_gate():
    parameters = random_parameters(3, 2)
    x, y = draw(parameters, 100)
    cold = GaussianMoEParameters.from_dict({**parameters.to_dict(), "temperature": 1e-9}).to_model(
        gate="dense_to_sparse"
    )
    torch.testing.assert_close(cold.log_density(x, y), parameters.to_model(gate="top_k", top_k=1).log_density(x, y))


def test_the_activation_gate_with_the_identity_is_dense_to_sparse():
    x, y = draw(TEMPERED, 50, -2, 2, gate="dense_to_sparse")
    linear, plain = (TEMPERED.to_model(**gate_for(name)) for name in ("linear", None))
    assert torch.equal(linear.log_density(x, y), plain.log_density(x, y))


def test_gradients_of_the_top_k_gate_are_finite_and_those_of_left_out_experts_zero():
    model = random_parameters(3, 2).to_model(gate="top_k", top_k=1)
    x = torch.ones(4, 2, dtype=torch.float64)  # every row chooses the same expert
    model(x, labels=torch.zeros(4)).loss.backward()
    chosen = model(x).gates[0] > 0
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all() and not parameter.grad[~chosen].any()
    assert model.weight.grad[chosen].any()


def fisher_information(activation, samples):
    """Mean outer product of the score, for beta1, beta0, temperature of expert 1 and a, b, nu of both."""
    x, y = draw(TEMPERED, samples, -2, 2, **gate_for(activation))
    model = TEMPERED.to_model(**gate_for(activation), **FREE)

    def log_density(free, x, y):
        beta1, beta0, temperature, a, b, nu = free[:1], free[1:2], free[2:3], free[3:5], free[5:7], free[7:9]
        zero = torch.zeros_like(beta0)
        values = {
            "gate_weight": torch.stack([beta1, zero]),
            "gate_bias": torch.cat([beta0, zero]),
            "log_temperature": (temperature / 0.8).log(),
            "weight": a.unsqueeze(-1),
            "bias": b,
            "log_variance": nu.log(),
        }
        return functional_call(Density(model), {f"model.{name}": value for name, value in values.items()}, (x, y))

    truth = torch.tensor([2.0, 0.5, 0.8, 2.0, -2.0, 1.0, -1.0, 0.5, 0.6], dtype=torch.float64)
    scores = vmap(jacrev(log_density), in_dims=(None, 0, 0))(truth, x, y)
    return torch.linalg.eigh(scores.T @ scores / samples)


class Density(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model.log_density(x.unsqueeze(0), y.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("activation", [None, "relu", "square"])
def test_the_information_about_a_temperature_under_homogeneous_scores_is_zero(activation):
    values, vectors = fisher_information(activation, 4000)
    assert abs(values[0]) < 1e-12 < 1e-4 < values[1]
    direction = vectors[:, 0] * vectors[0, 0].sign()
    # (2, .5, .8) where scores are of degree 1; beta1 goes with the root of c where they are squared
    expected = torch.tensor([1.0 if activation == "square" else 2.0, 0.5, 0.8, *[0.0] * 6], dtype=torch.float64)
    torch.testing.assert_close(direction, expected / expected.norm(), rtol=0, atol=1e-7)
    if activation is None:
        torch.testing.assert_close(
            direction[:3], torch.tensor([0.904, 0.226, 0.362], dtype=torch.float64), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize(("activation", "expected"), [("sigmoid", 3e-4), ("gelu", 3e-4), ("tanh", 1.3e-3)])
def test_the_information_under_curved_scores_is_positive(activation, expected):
    smallest = fisher_information(activation, 20_000)[0][0].item()
    assert expected / 1.6 < smallest < expected * 1.6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": "softmaks"}, "`gate` must be one of"),
        ({"gate": "top_k"}, "`top_k` must be between 1 and"),
        ({"gate": "top_k", "top_k": 3}, "`top_k` must be between 1 and"),
        ({"top_k": 1}, "needs `gate='top_k'`"),
        ({"temperature": 0.5}, "`gate='softmax'` has no temperature"),
        ({"gate": "dense_to_sparse", "temperature": 0.0}, "`temperature` must be a positive number, got 0"),
        ({"gate": "dense_to_sparse", "learn_temperature": True}, "linear scores: .c beta1, c beta0, c temperature"),
        (
            {"gate": "activation", "activation": "relu", "learn_temperature": True},
            "cannot work with `activation='relu'",
        ),
        ({"gate": "activation", "activation": "square", "learn_temperature": True}, r"c\^\(1/2\) beta1"),
        ({"activation": "swish"}, "`activation` must be one of"),
        ({"num_components": 0}, "`num_components` must be at least 1"),
        ({"min_variance": -1.0}, "`min_variance` must be a positive number"),
    ],
)
def test_configs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxGaussianMoEConfig(**fields)


def test_inputs_and_labels_of_other_shapes_are_refused():
    model = random_parameters(2, 2).to_model()
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 2\), got \(4, 3\)"):
        model(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one number for each of the 4 inputs, got 3"):
        model(torch.zeros(4, 2), labels=torch.zeros(3))


def test_samples_have_the_density():
    x, y = draw(TWO_LINES, 4000, gate="top_k", top_k=1)
    model = TWO_LINES.to_model(gate="top_k", top_k=1)
    expert = model(x).gates.argmax(-1)
    residual = y - model(x).expert_means.gather(-1, expert[:, None])[:, 0]
    for i, variance in enumerate((0.3, 0.4)):
        assert residual[expert == i].var().item() == pytest.approx(variance, rel=0.1)


def test_a_model_of_random_weights_learns_nothing_below_its_least_variance():
    config = SoftmaxGaussianMoEConfig(num_components=1, min_variance=0.25)
    model = SoftmaxGaussianMoEForRegression(config)
    model.log_variance.data.fill_(-50.0)
    assert model.variance.tolist() == [0.25]
