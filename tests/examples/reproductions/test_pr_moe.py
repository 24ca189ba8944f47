import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def figures():
    harness, module = load_example("reproductions/harness"), load_example("reproductions/pr_moe")
    bench = harness.Bench(harness.PRESETS["tiny"], seed=0)
    return {name: arm(bench) for name, arm in module.REPRODUCTION.arms.items()}


def test_the_pyramid_is_smaller_and_the_residual_a_little_larger(figures):
    size = {name: row["million_parameters"] for name, row in figures.items()}
    assert size["plain, top-1"] == size["plain, top-2"]
    assert size["pyramid"] < size["PR-MoE"] < size["plain, top-1"] < size["residual"]


def test_arms_differ(figures):
    losses = [row["bits_per_byte"] for row in figures.values()]
    assert len(set(losses)) == len(losses) and all(0 < loss < 10 for loss in losses)
