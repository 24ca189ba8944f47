"""Voronoi losses, by hand and at their zeros."""

import itertools
import math

import pytest
import torch
from common.gaussian_mixtures import TEMPERED, TWO_LINES

from hf_moe.statistics import (
    GaussianMoEParameters,
    align_gate,
    match_components,
    parameter_errors,
    voronoi_cells,
    voronoi_loss,
)


NEAR = GaussianMoEParameters([[25.1], [0.05]], [-8.0, 0.1], [[-20.2], [20.1]], [15.0, -5.0], [0.3, 0.45])


@pytest.mark.parametrize(("top_k", "expected"), [(1, 0.326205), (2, 0.326306), (None, 0.326306)])
def test_the_loss_computed_by_hand(top_k, expected):
    assert voronoi_loss(NEAR, TWO_LINES, top_k=top_k) == pytest.approx(expected, abs=1e-6)


def test_the_loss_is_a_maximum_over_subsets():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, 5, 4, 2, generator=generator, dtype=torch.float64)
    fitted, true = (GaussianMoEParameters(n[0], n[1, :, 0], n[2], n[3, :, 0], n[4, :, 0].exp()) for n in numbers)
    cells = voronoi_cells(fitted, true)
    for top_k in range(1, 5):
        sums = []
        for subset in itertools.combinations(range(4), top_k):
            total = 0.0
            for j in subset:
                mass = 0.0
                for i in (cells == j).nonzero().flatten().tolist():
                    names = ("gate_weight", "weight", "bias", "variance")
                    distance = sum((getattr(fitted, n)[i] - getattr(true, n)[j]).norm().item() for n in names)
                    total += math.exp(fitted.gate_bias[i]) * distance
                    mass += math.exp(fitted.gate_bias[i])
                total += abs(mass - math.exp(true.gate_bias[j]))
            sums.append(total)
        assert voronoi_loss(fitted, true, top_k=top_k) == pytest.approx(max(sums))


@pytest.mark.parametrize("kind", ["D1", "D2"])
def test_the_loss_is_zero_for_the_same_parameters_in_any_order(kind):
    for true in (TWO_LINES, TEMPERED):
        for order in ([0, 1], [1, 0]):
            assert voronoi_loss(true.permuted(order), true, kind) == 0


@pytest.mark.parametrize("name", ["gate_weight", "gate_bias", "weight", "bias", "variance", "temperature"])
def test_the_loss_is_not_zero_for_any_other_parameter(name):
    changed = TEMPERED.to_dict()
    if name == "temperature":
        changed[name] += 0.01
    else:
        changed[name] = (getattr(TEMPERED, name) + 0.01).tolist()
    fitted = GaussianMoEParameters.from_dict(changed)
    assert voronoi_loss(fitted, TEMPERED) > 0.005
    # where only one of two experts counts, it is the one that is further off
    assert voronoi_loss(fitted, TEMPERED, top_k=1) > 0.005


def test_an_expert_in_two_halves_has_no_loss():
    halves = TWO_LINES.permuted([0, 1, 1])
    halves = halves.from_dict({**halves.to_dict(), "gate_bias": [-8.0, math.log(0.3), math.log(0.7)]})
    assert voronoi_cells(halves, TWO_LINES).tolist() == [0, 1, 1]
    for kind in ("D1", "D2"):
        assert voronoi_loss(halves, TWO_LINES, kind) == pytest.approx(0, abs=1e-12)


def test_a_cell_of_two_counts_with_the_powers_four_and_two():
    halves = TWO_LINES.permuted([0, 1, 1]).to_dict()
    halves["gate_bias"] = [-8.0, math.log(0.5), math.log(0.5)]
    for name, power in (("gate_weight", 4), ("bias", 4), ("weight", 2), ("variance", 2)):
        values = torch.tensor(halves[name])
        values[1] += 0.1
        fitted = GaussianMoEParameters.from_dict({**halves, name: values.tolist()})
        assert voronoi_loss(fitted, TWO_LINES, "D2") == pytest.approx(0.5 * 0.1**power, rel=1e-4)
        assert voronoi_loss(fitted, TWO_LINES, "D1") == pytest.approx(0.5 * 0.1, rel=1e-4)


def test_cells_of_four_have_no_known_order():
    with pytest.raises(ValueError, match="but one has 4"):
        voronoi_loss(TWO_LINES.permuted([0, 1, 1, 1, 1]), TWO_LINES, "D2")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`kind` must be 'D1' or 'D2'"):
        voronoi_loss(NEAR, TWO_LINES, "D3")
    with pytest.raises(ValueError, match="`top_k` must be between 1 and the 2 true experts"):
        voronoi_loss(NEAR, TWO_LINES, top_k=3)
    with pytest.raises(ValueError, match="`fitted` has 2 inputs"):
        wide = GaussianMoEParameters(torch.zeros(1, 2), [0.0], torch.zeros(1, 2), [0.0], [1.0])
        voronoi_loss(wide, TWO_LINES)
    with pytest.raises(ValueError, match="there is no pairing"):
        match_components(TWO_LINES.permuted([0]), TWO_LINES)


def test_a_shift_of_all_scores_is_undone():
    shifted = TWO_LINES.permuted([1, 0]).shifted(torch.tensor([3.0]), -2.0)
    assert voronoi_loss(shifted, TWO_LINES) > 1
    assert voronoi_loss(align_gate(shifted, TWO_LINES), TWO_LINES) == pytest.approx(0, abs=1e-12)
    # an activation has no such freedom in beta1, and divides beta0
    tempered = TEMPERED.shifted(torch.zeros(1), -2.0)
    assert voronoi_loss(align_gate(tempered, TEMPERED, linear_scores=False), TEMPERED) == pytest.approx(0, abs=1e-12)


def test_a_shift_of_a_split_expert_is_undone():
    halves = TWO_LINES.permuted([0, 1, 1]).to_dict()
    halves["gate_bias"] = [-8.0, math.log(0.2), math.log(0.8)]
    shifted = GaussianMoEParameters.from_dict(halves).shifted(torch.tensor([-1.0]), 0.5)
    assert voronoi_loss(align_gate(shifted, TWO_LINES), TWO_LINES) == pytest.approx(0, abs=1e-12)


def test_matching_restores_the_order_and_leaves_out_the_surplus():
    surplus = GaussianMoEParameters.from_dict(
        {name: [getattr(NEAR, name)[1].tolist(), getattr(far(), name)[0].tolist(), getattr(NEAR, name)[0].tolist()]
         for name in ("gate_weight", "gate_bias", "weight", "bias", "variance")}
    )  # fmt: skip
    assert match_components(surplus, TWO_LINES).to_dict() == NEAR.to_dict()
    errors = parameter_errors(surplus, TWO_LINES)
    assert errors["weight"] == pytest.approx(0.15) and errors["gate_weight"] == pytest.approx(0.075)
    assert errors["bias"] == 0 and errors["temperature"] == 0


def far():
    return GaussianMoEParameters([[100.0]], [0.0], [[100.0]], [0.0], [1.0])


def test_parameters_that_do_not_belong_together_are_refused():
    good = TWO_LINES.to_dict()
    for name, value, message in (
        ("gate_bias", [0.0], r"`gate_bias` must have shape \(2,\)"),
        ("weight", [1.0, 2.0], r"`weight` must have shape \(k, d\)"),
        ("variance", [0.3, 0.0], "`variance` must be positive"),
        ("bias", [math.nan, 0.0], "`bias` must be finite"),
        ("temperature", 0.0, "`temperature` must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianMoEParameters.from_dict({**good, name: value})
    with pytest.raises(ValueError, match="which it does not learn"):
        TEMPERED.write_to(TWO_LINES.to_model())
    with pytest.raises(ValueError, match="below the model's `min_variance`"):
        TWO_LINES.to_model(min_variance=1.0)
    with pytest.raises(ValueError, match="have 2 components of 1 inputs; `model` has 1 of 1"):
        TWO_LINES.write_to(far().to_model())
