"""The estimator: finds the truth without being told where to begin, and behaves as scikit-learn wants."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from common.gaussian_mixtures import TEMPERED, TWO_LINES, draw

from hf_moe import SoftmaxGaussianMoE, SoftmaxGaussianMoEForRegression
from hf_moe.statistics import parameter_errors


@pytest.fixture(scope="module")
def data():
    x, y = draw(TEMPERED, 1000, -2, 2, gate="dense_to_sparse")
    return x.numpy(), y.numpy()


def fitted(data, **options):
    return SoftmaxGaussianMoE(random_state=0, **options).fit(*data)


@pytest.mark.parametrize("method", ["em", "lbfgs"])
def test_it_finds_the_truth_from_random_starts(method):
    x, y = draw(TWO_LINES, 3000, gate="softmax")
    moe = SoftmaxGaussianMoE(method=method, random_state=0).fit(x, y)
    errors = parameter_errors(moe.parameters_, TWO_LINES)
    assert errors["weight"] < 0.3 and errors["bias"] < 0.2 and errors["variance"] < 0.05 and moe.converged_
    assert moe.log_likelihood_ >= TWO_LINES.to_model().log_density(x, y).mean()


def test_it_finds_a_top_1_truth_with_its_boundary():
    x, y = draw(TWO_LINES, 2000, gate="top_k", top_k=1)
    moe = SoftmaxGaussianMoE(gate="top_k", top_k=1, random_state=0).fit(x, y)
    slopes = sorted(moe.parameters_.weight[:, 0].tolist())
    assert slopes == pytest.approx([-20, 20], abs=0.7)
    gates = moe.predict_gates([[0.30], [0.34]])
    assert set(gates.ravel()) == {0.0, 1.0} and not np.array_equal(gates[0], gates[1])  # it is at 0.32


def test_a_learned_temperature_of_a_curved_gate_is_found():
    x, y = draw(TEMPERED, 4000, -2, 2, gate="activation")
    moe = SoftmaxGaussianMoE(gate="activation", learn_temperature=True, random_state=0).fit(x, y)
    truth = TEMPERED.to_model(gate="activation").log_density(x, y).mean().item()
    assert moe.log_likelihood_ >= truth and parameter_errors(moe.parameters_, TEMPERED)["weight"] < 0.15
    assert moe.parameters_.temperature != 1.0


def test_what_it_predicts_is_what_its_model_says(data):
    x, y = data
    moe = fitted(data)
    model = moe.model_
    with torch.no_grad():
        outputs = model(torch.from_numpy(x), labels=torch.from_numpy(y))
    assert isinstance(model, SoftmaxGaussianMoEForRegression)
    np.testing.assert_array_equal(moe.predict(x), outputs.mean)
    np.testing.assert_array_equal(moe.predict_gates(x), outputs.gates)
    assert moe.score(x, y) == pytest.approx(-outputs.loss.item()) == pytest.approx(moe.log_likelihood_)
    np.testing.assert_allclose(moe.log_density(x, y).mean(), moe.score(x, y))


def test_responsibilities_are_the_posterior(data):
    x, y = data
    moe = fitted(data)
    with torch.no_grad():
        densities = moe.model_.expert_log_density(torch.from_numpy(x), torch.from_numpy(y)).exp().numpy()
    joint = moe.predict_gates(x) * densities
    np.testing.assert_allclose(moe.responsibilities(x, y), joint / joint.sum(1, keepdims=True))


def test_samples_have_the_predicted_mean_and_variance(data):
    moe = fitted(data)
    x = np.full((40_000, 1), 0.4)
    y = moe.sample(x, random_state=0)
    assert y.mean() == pytest.approx(moe.predict(x[:1])[0], abs=0.03)
    assert y.var() == pytest.approx(moe.predict_variance(x[:1])[0], rel=0.03)
    np.testing.assert_array_equal(y, moe.sample(x, random_state=0))
    assert not np.array_equal(y, moe.sample(x, random_state=1))


def test_the_same_seed_gives_the_same_fit_and_global_random_numbers_are_untouched(data):
    state = torch.random.get_rng_state()
    one, two = (fitted(data, n_init=2) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.parameters_.to_dict() == two.parameters_.to_dict()
    third = SoftmaxGaussianMoE(n_init=2, random_state=np.random.RandomState(0)).fit(*data)
    assert third.log_likelihood_ == pytest.approx(one.log_likelihood_, abs=1e-5)


def test_a_start_of_ones_own_is_used(data):
    moe = SoftmaxGaussianMoE(init=TEMPERED.from_dict({**TEMPERED.to_dict(), "temperature": 1.0}), max_iter=1).fit(
        *data
    )
    assert parameter_errors(moe.parameters_, TEMPERED)["weight"] < 0.3


def test_tensors_lists_and_columns_are_taken(data):
    x, y = data
    expected = fitted(data, n_init=1).predict(x)
    options = {"n_init": 1, "random_state": 0}
    np.testing.assert_array_equal(
        SoftmaxGaussianMoE(**options).fit(torch.tensor(x), torch.tensor(y)).predict(x), expected
    )
    np.testing.assert_array_equal(SoftmaxGaussianMoE(**options).fit(x.tolist(), y.tolist()).predict(x), expected)
    with pytest.warns(UserWarning, match="A column-vector y was passed"):
        moe = SoftmaxGaussianMoE(**options).fit(x, y[:, None])
    np.testing.assert_array_equal(moe.predict(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, "`method` must be one of"),
        ({"init": "zeros"}, "`init` must be 'kmeans' or GaussianMoEParameters"),
        ({"n_init": 0}, "`n_init` and `max_iter` must be positive"),
        ({"num_components": 2000}, "needs as many observations"),
        ({"gate": "dense_to_sparse", "learn_temperature": True}, "`learn_temperature=True` cannot work with linear"),
        ({"gate": "top_k"}, "`top_k` must be between 1 and"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxGaussianMoE(**options).fit(*data)


def test_data_that_make_no_sense_are_refused(data):
    x, y = data
    moe = SoftmaxGaussianMoE()
    with pytest.raises(ValueError, match="not fitted yet"):
        moe.predict(x)
    for bad_x, bad_y, message in (
        (x[:, 0], y, "Expected 2D array, got 1D"),
        (x, y[:-1], "inconsistent numbers of samples"),
        (x, None, "requires y to be passed"),
        (x * np.nan, y, "contains NaN or infinity"),
        (x[:0], y[:0], r"0 sample\(s\)"),
    ):
        with pytest.raises(ValueError, match=message):
            moe.fit(bad_x, bad_y)
    with pytest.raises(ValueError, match="X has 2 features, but SoftmaxGaussianMoE is expecting 1"):
        moe.fit(x, y).predict(np.zeros((3, 2)))


def test_parameters_go_in_and_out_by_name():
    moe = SoftmaxGaussianMoE(3, gate="top_k", top_k=2)
    assert (
        moe.get_params()["top_k"] == 2 and repr(moe) == "SoftmaxGaussianMoE(gate='top_k', num_components=3, top_k=2)"
    )
    assert moe.set_params(top_k=1) is moe and moe.top_k == 1
    with pytest.raises(ValueError, match="Invalid parameter 'k' for estimator"):
        moe.set_params(k=1)


def test_a_pickled_estimator_predicts_the_same(data):
    moe = fitted(data, n_init=1)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(moe)).predict(data[0]), moe.predict(data[0]))


def test_the_package_works_without_scikit_learn(run_python):
    code = """
import sys
sys.modules["sklearn"] = None
import numpy as np
from hf_moe import SoftmaxGaussianMoE
x = np.linspace(0, 1, 50)[:, None]
print(SoftmaxGaussianMoE(1, n_init=1).fit(x, 2 * x[:, 0] + np.sin(50 * x[:, 0])).predict([[0.5]]))
"""
    result = run_python(code)
    assert result.stdout.startswith("["), result.stderr


# -- scikit-learn ----------------------------------------------------------------------------------------------------
def test_clones_pipelines_and_searches_work(data):
    pytest.importorskip("sklearn")
    from sklearn.base import clone, is_regressor
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    moe = SoftmaxGaussianMoE(n_init=2, random_state=0)
    assert is_regressor(moe) and clone(moe).get_params() == moe.get_params()
    pipeline = make_pipeline(StandardScaler(), moe)
    grid = {"softmaxgaussianmoe__num_components": [1, 2]}
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(*data)
    assert search.best_params_ == {"softmaxgaussianmoe__num_components": 2}
    assert search.score(*data) > search.cv_results_["mean_test_score"][0] + 0.1


@pytest.mark.slow
def test_every_check_of_scikit_learn_passes():
    estimator_checks = pytest.importorskip("sklearn.utils.estimator_checks")
    moe = SoftmaxGaussianMoE(n_init=1, random_state=0, max_iter=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = estimator_checks.check_estimator(moe, on_fail=None)
    assert [result["check_name"] for result in results if result["status"] == "failed"] == []
    assert sum(result["status"] == "passed" for result in results) > 40
