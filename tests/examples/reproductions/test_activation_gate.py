import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def figures():
    harness, gate = load_example("reproductions/harness"), load_example("reproductions/activation_gate")
    bench = harness.Bench(harness.PRESETS["tiny"], seed=0)
    return {name: arm(bench) for name, arm in gate.REPRODUCTION.arms.items()}


def test_every_arm_learns_something_of_its_own(figures):
    scores = [row["bits_per_byte"] for row in figures.values()]
    assert all(0 < score < 9 for score in scores) and len(set(scores)) == len(scores)


def test_temperatures_move_where_they_are_learned_and_nowhere_else(figures):
    temperatures = {name: row["temperature"] for name, row in figures.items()}
    assert temperatures["linear top-2"] == 1.0
    assert temperatures["linear, temperature 0.1"] == pytest.approx(0.1)
    assert temperatures["dense to sparse"] == pytest.approx(0.3)
    for name, start in (("tanh, learned from 0.5", 0.5), ("sigmoid, learned from 0.1", 0.1)):
        assert temperatures[name] != pytest.approx(start, rel=1e-5) and start / 2 < temperatures[name] < 2 * start


def test_only_the_annealed_gate_uses_more_experts_in_training(figures):
    for name, row in figures.items():
        if name == "dense to sparse":
            assert 2 < row["experts_in_training"] <= 8
        else:
            assert row["experts_in_training"] == pytest.approx(2)
