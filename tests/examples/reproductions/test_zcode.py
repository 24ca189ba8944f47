import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("reproductions/harness"), load_example("reproductions/zcode")


@pytest.fixture(scope="module")
def figures(example):
    harness, zcode = example
    bench = harness.Bench(harness.PRESETS["tiny"], seed=0)
    return {name: arm(bench) for name, arm in zcode.REPRODUCTION.arms.items()}


def test_every_arm_has_the_loss_of_the_whole_and_of_both_halves(figures):
    assert len(figures) == 5
    for row in figures.values():
        assert set(row) == {"bits_per_byte", "half_by_load", "half_by_random"}
        assert all(0 < value < 12 for value in row.values())


def test_the_arms_are_different_runs(figures):
    assert len({row["bits_per_byte"] for row in figures.values()}) == 5


def test_all_stretches_together_are_the_budget(example):
    _, zcode = example
    assert zcode.BEGINNING + zcode.MIDDLE + zcode.END == pytest.approx(1)
