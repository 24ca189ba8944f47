"""Rate studies: known slopes are found, data are fresh, and the theory's rates come out."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from common.gaussian_mixtures import TEMPERED, TWO_LINES

from hf_moe.statistics import (
    GaussianMoEParameters,
    RateExperiment,
    RateStudy,
    hellinger_distance,
    plot_rates,
    rate_study,
)


TOP_1 = {"gate": "top_k", "top_k": 1}
EXACT = RateExperiment(
    name="top-1", truth=TWO_LINES, true_gate=TOP_1, errors=("D1",), method="em", theory={"D1": -0.5}
)


def synthetic(slope, repetitions=50, noise=0.2):
    sizes = (100, 1000, 10_000)
    noise = np.exp(noise * np.random.default_rng(0).standard_normal((3, repetitions)))
    return RateStudy("made up", sizes, {"D1": noise * np.array(sizes)[:, None] ** slope}, {"D1": slope})


@pytest.mark.parametrize("slope", [-0.5, -0.25, 0.0])
def test_a_known_slope_is_found_inside_its_interval(slope):
    found = synthetic(slope).slope("D1")
    assert found.low < slope < found.high and found.value == pytest.approx(slope, abs=0.03)
    assert found.high - found.low < 0.1 and found.theory == slope
    exact = synthetic(slope, noise=0.0).slope("D1")
    assert exact.value == pytest.approx(slope, abs=1e-12) and exact.intercept == pytest.approx(0, abs=1e-9)
    assert exact.low == pytest.approx(exact.high)


def test_the_line_begins_where_it_is_told_to():
    study = synthetic(-0.5, noise=0.0)
    study.errors["D1"][0] *= 100  # far off at the smallest size
    assert study.slope("D1").value < -1 and study.slope("D1", first=1).value == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="`first=2` leaves fewer than two of the 3"):
        study.slope("D1", first=2)


def test_a_study_is_the_same_each_time_and_every_repetition_has_data_of_its_own():
    studies = [rate_study(EXACT, [200, 400], 3, seed=1) for _ in range(2)]
    np.testing.assert_array_equal(studies[0].errors["D1"], studies[1].errors["D1"])
    assert len(np.unique(studies[0].errors["D1"])) == 6
    other = rate_study(EXACT, [200, 400], 3, seed=2)
    assert not np.isin(other.errors["D1"], studies[0].errors["D1"]).any()


def test_sizes_come_sorted_with_their_own_errors():
    study = rate_study(EXACT, [400, 200], 2)
    assert study.sizes == (200, 400)
    assert study.errors["D1"][1, 0] == EXACT.run(400, 0)["D1"] and study.errors["D1"][0, 1] == EXACT.run(200, 1)["D1"]


@pytest.mark.slow
def test_processes_change_nothing():
    alone, together = (rate_study(EXACT, [200, 400], 2, processes=processes) for processes in (1, 2))
    np.testing.assert_allclose(alone.errors["D1"], together.errors["D1"], rtol=1e-9)


def test_an_experiment_travels_between_processes():
    copy = pickle.loads(pickle.dumps(EXACT))
    assert copy.truth.to_dict() == EXACT.truth.to_dict() and copy.run(200, 0) == EXACT.run(200, 0)


def test_surplus_experts_start_as_shares_of_true_ones():
    experiment = RateExperiment(
        name="", truth=TWO_LINES, true_gate={"gate": "softmax"}, num_components=4, jitter=0.0, errors=("D1",)
    )
    x = torch.rand(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = TWO_LINES.to_model().sample(x, torch.Generator().manual_seed(0))
    for seed in range(5):
        model = experiment.start(100, torch.Generator().manual_seed(seed))
        assert model.config.num_components == 4
        torch.testing.assert_close(model.log_density(x, y), TWO_LINES.to_model().log_density(x, y))


def test_the_gate_of_the_last_expert_is_known():
    experiment = RateExperiment(name="", truth=TEMPERED, true_gate={"gate": "activation"}, jitter=0.5, errors=("D1",))
    model = experiment.start(100, torch.Generator().manual_seed(0))
    assert model.gate_weight[-1] == 0 and model.gate_bias[-1] == 0
    assert (model.gate_weight[0] - 2).abs() > 0.01 and (model.weight[-1] + 2).abs() > 0.01


def test_the_distance_of_densities_is_that_of_hellinger():
    one, other = (GaussianMoEParameters([[0.0]], [0.0], [[0.0]], [b], [1.0]).to_model() for b in (0.0, 0.7))
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(40_000, 1)
    expected = math.sqrt(1 - math.exp(-(0.7**2) / 8))
    assert hellinger_distance(one, other, x, generator) == pytest.approx(expected, rel=0.02)
    assert hellinger_distance(one, one, x, generator) == 0
    far = GaussianMoEParameters([[0.0]], [0.0], [[0.0]], [100.0], [1.0]).to_model()
    assert hellinger_distance(one, far, x, generator) == pytest.approx(1)


def test_table_and_json_hold_the_slopes():
    study = synthetic(-0.5)
    (row,) = study.table()
    assert (
        row["experiment"] == "made up"
        and row["theory"] == "-0.500"
        and float(row["slope"]) == pytest.approx(-0.5, abs=0.03)
    )
    stored = json.loads(json.dumps(study.to_dict()))
    assert stored["slopes"]["D1"]["value"] == study.slope("D1").value and np.shape(stored["errors"]["D1"]) == (3, 50)


def test_a_plot_has_points_line_and_theory(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = plot_rates([synthetic(-0.5), synthetic(-0.25)], "D1", tmp_path / "plots" / "d1.png", title="Two rates")
    colors = imread(path)[..., :3].reshape(-1, 3).std(-1)
    assert (colors > 0.1).sum() > 1000  # coloured pixels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"errors": ("D3",)}, r"`errors` has \['D3'\]"),
        ({"method": "newton"}, "`method` must be one of"),
        ({"inputs": "cauchy"}, "`inputs` must be one of"),
        ({"num_components": 1}, "`num_components` must be at least the 2 of the truth"),
        ({"true_gate": {"gate": "top_k"}}, "`top_k` must be between 1 and"),
    ],
)
def test_experiments_that_make_no_sense_are_refused_when_made(fields, message):
    with pytest.raises(ValueError, match=message):
        RateExperiment(**{"name": "", "truth": TWO_LINES, "true_gate": TOP_1, **fields})


def test_studies_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="`sizes` must hold at least two different positive numbers"):
        rate_study(EXACT, [100, 100], 2)
    with pytest.raises(ValueError, match="`repetitions` and `processes` must be positive"):
        rate_study(EXACT, [100, 200], 0)


# -- the theory ------------------------------------------------------------------------------------------------------
def test_the_loss_of_a_top_1_truth_falls():
    study = rate_study(EXACT, [500, 8000], 6)
    assert -0.9 < study.slope("D1").value < -0.2


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["uniform", "normal"])
def test_the_loss_of_a_top_1_truth_falls_with_the_root_of_n(inputs):
    experiment = RateExperiment(name="", truth=TWO_LINES, true_gate=TOP_1, errors=("D1",), method="em", inputs=inputs)
    study = rate_study(experiment, [1000, 3200, 10_000, 32_000, 100_000], 40)
    assert -0.6 < study.slope("D1").value < -0.35


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["linear", "tanh"])
def test_a_learned_temperature_leaves_a_linear_gate_where_it_started(gate):
    gates = {
        "linear": {"gate": "dense_to_sparse", "learn_temperature": True, "allow_unidentifiable": True},
        "tanh": {"gate": "activation", "learn_temperature": True},
    }
    experiment = RateExperiment(
        name=gate, truth=TEMPERED, true_gate=gates[gate], input_range=(-2.0, 2.0), jitter=0.05, jitter_power=0.0,
        errors=("gate_weight", "weight", "bias", "variance"), options={"fix_last_gate": True},
    )  # fmt: skip
    study = rate_study(experiment, [1000, 4000, 16_000], 16)
    for error in ("weight", "bias", "variance"):
        assert -0.8 < study.slope(error).value < -0.3, error
    slope = study.slope("gate_weight").value
    assert slope > -0.25 if gate == "linear" else slope < -0.3
