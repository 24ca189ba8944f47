"""EM and L-BFGS: neither loses likelihood, both find the same estimate, and it is near the truth."""

import pytest
import torch
from common.gaussian_mixtures import TEMPERED, TWO_LINES, draw

from hf_moe.statistics import GaussianMoEParameters, fit_em, fit_lbfgs, parameter_errors, voronoi_loss


GATES = {
    "softmax": ({"gate": "softmax"}, {"gate": "softmax"}),
    "top_k": ({"gate": "top_k", "top_k": 2}, {"gate": "top_k", "top_k": 2}),
    "dense_to_sparse": ({"gate": "dense_to_sparse"}, {"gate": "dense_to_sparse", "temperature": 0.5}),
    "activation": ({"gate": "activation"}, {"gate": "activation", "learn_temperature": True}),
    "sigmoid": ({"gate": "activation"}, {"gate": "activation", "activation": "sigmoid"}),
    "unidentifiable": (
        {"gate": "dense_to_sparse"},
        {"gate": "dense_to_sparse", "learn_temperature": True, "allow_unidentifiable": True},
    ),
}


def random_model(k, d, seed=0, **gate):
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((k, d), k, (k, d), k)]
    return GaussianMoEParameters(*numbers, torch.ones(k), gate.get("temperature", 1.0)).to_model(**gate)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("search_selection", [False, True])
def test_em_never_lowers_the_log_likelihood(name, search_selection):
    x, y = draw(TEMPERED, 400, -2, 2, gate="dense_to_sparse")
    x = torch.cat([x, x.sin() + 0.1 * y.unsqueeze(-1)], dim=-1)
    for seed in range(3):
        model = random_model(3, 2, seed, **GATES[name][1])
        result = fit_em(model, x, y, max_iter=60, tol=0.0, search_selection=search_selection)
        steps = torch.tensor(result.log_likelihoods).diff()
        assert steps.min() >= -1e-9 and result.log_likelihood > result.log_likelihoods[0] + 0.1
        with torch.no_grad():
            assert model.log_density(x, y).mean().item() == pytest.approx(result.log_likelihood, abs=1e-12)
        assert model.gate_bias[-1] == 0  # the free choice among equal densities


@pytest.mark.parametrize("name", ["softmax", "dense_to_sparse", "activation"])
def test_em_and_lbfgs_find_the_same_estimate(name):
    x, y = draw(TEMPERED, 2000, -2, 2, gate="dense_to_sparse")
    estimates = []
    for fit, tol in ((fit_em, 1e-13), (fit_lbfgs, 1e-9)):
        start = GaussianMoEParameters([[1.0], [0.0]], [0.0, 0.0], [[1.0], [-1.0]], [0.0, 0.0], [1.0, 1.0])
        gate = GATES[name][1]
        start = start.from_dict({**start.to_dict(), "temperature": gate.get("temperature", 1.0)})
        model = start.to_model(**gate)
        result = fit(model, x, y, tol=tol, fix_last_gate=True)
        assert result.converged
        estimates.append((result.log_likelihood, GaussianMoEParameters.of(model)))
    assert estimates[0][0] == pytest.approx(estimates[1][0], abs=1e-8)
    assert voronoi_loss(estimates[0][1], estimates[1][1]) < 2e-2
    assert parameter_errors(estimates[0][1], estimates[1][1])["weight"] < 1e-4


@pytest.mark.parametrize("fit", [fit_em, fit_lbfgs])
def test_the_estimate_is_near_the_truth(fit):
    x, y = draw(TWO_LINES, 20_000, gate="softmax")
    start = TWO_LINES.to_dict()
    start["gate_weight"], start["weight"] = [[20.0], [0.0]], [[-15.0], [15.0]]
    model = GaussianMoEParameters.from_dict(start).to_model()
    fit(model, x, y)
    errors = parameter_errors(GaussianMoEParameters.of(model), TWO_LINES)
    assert errors["gate_weight"] < 1.0 and errors["weight"] < 0.1 and errors["variance"] < 0.02


def test_with_one_expert_it_is_least_squares():
    x, y = draw(TEMPERED, 300, -2, 2, gate="dense_to_sparse")
    design = torch.cat([x, torch.ones_like(x)], dim=-1)
    expected = torch.linalg.lstsq(design, y.unsqueeze(-1)).solution[:, 0]
    variance = (y - design @ expected).square().mean()
    for fit in (fit_em, fit_lbfgs):
        model = random_model(1, 1)
        fit(model, x, y, tol=1e-12)
        torch.testing.assert_close(torch.cat([model.weight[0], model.bias]).detach(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.variance[0].detach(), variance, rtol=1e-6, atol=0)


def test_top_1_em_is_least_squares_in_the_regions_of_the_gate():
    x, y = draw(TWO_LINES, 3000, gate="top_k", top_k=1)
    model = TWO_LINES.to_model(gate="top_k", top_k=1)
    fit_em(model, x, y)
    left = x[:, 0] < 0.32  # where 25 x - 8 changes its sign
    for i, region in ((0, ~left), (1, left)):
        design = torch.cat([x, torch.ones_like(x)], dim=-1)[region]
        expected = torch.linalg.lstsq(design, y[region].unsqueeze(-1)).solution[:, 0]
        found = torch.cat([model.weight[i], model.bias[i : i + 1]]).detach()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.gate_weight.detach(), TWO_LINES.gate_weight)


def test_the_selection_is_learned_when_asked_for():
    x, y = draw(TWO_LINES, 2000, gate="top_k", top_k=1)
    start = GaussianMoEParameters.from_dict({**TWO_LINES.to_dict(), "gate_bias": [-10.0, 0.0]})  # boundary at 0.4
    values = {}
    for search in (False, True):
        model = start.to_model(gate="top_k", top_k=1)
        values[search] = fit_em(model, x, y, search_selection=search).log_likelihood
    assert values[True] > values[False] + 0.4


def test_fits_stay_above_the_least_variance():
    x = torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(-1)
    y = 3 * x[:, 0] + 1  # a line without noise
    for fit in (fit_em, fit_lbfgs):
        model = random_model(2, 1, min_variance=1e-4)
        result = fit(model, x, y, max_iter=100)
        assert torch.tensor(result.log_likelihoods).isfinite().all() and (model.variance >= 1e-4).all()


def test_an_expert_without_observations_stays_where_it_is():
    x, y = draw(TWO_LINES, 500, gate="softmax")
    idle = TWO_LINES.permuted([0, 1, 1]).to_dict()
    idle["gate_bias"], idle["weight"] = [-8.0, 0.0, -60.0], [[-20.0], [20.0], [500.0]]
    idle = GaussianMoEParameters.from_dict(idle).permuted([2, 0, 1])
    model = idle.to_model()
    fit_em(model, x, y, max_iter=5)
    assert model.weight[0].item() == 500 and all(p.isfinite().all() for p in model.parameters())


def test_lbfgs_never_ends_worse_than_it_began():
    x, y = draw(TWO_LINES, 500, gate="top_k", top_k=1)
    for seed in range(5):
        model = random_model(3, 1, seed, gate="top_k", top_k=2)
        result = fit_lbfgs(model, x, y, max_iter=20)
        with torch.no_grad():
            found = model.log_density(x, y).mean().item()
        assert found == pytest.approx(result.log_likelihood) and found >= result.log_likelihoods[0]


@pytest.mark.parametrize("fit", [fit_em, fit_lbfgs])
def test_bad_data_are_refused_before_anything_changes(fit):
    model = random_model(2, 1)
    before = GaussianMoEParameters.of(model).to_dict()
    with pytest.raises(ValueError, match=r"`x` must have shape \(n, 1\) and `y` \(n,\)"):
        fit(model, torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        fit(model, torch.zeros(3, 1), torch.full((3,), float("nan")))
    with pytest.raises(ValueError, match="`fix_last_gate=False` leaves linear scores undetermined"):
        fit(model, torch.zeros(3, 1), torch.zeros(3), fix_last_gate=False)
    assert GaussianMoEParameters.of(model).to_dict() == before


def test_both_work_in_single_precision():
    x, y = draw(TEMPERED, 500, -2, 2, gate="dense_to_sparse")
    for fit in (fit_em, fit_lbfgs):
        model = TEMPERED.to_model(gate="dense_to_sparse").float()
        assert fit(model, x, y, max_iter=20).log_likelihood > -2
        assert model.weight.dtype == torch.float32
