import math

import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def figures():
    harness, growth = load_example("reproductions/harness"), load_example("reproductions/growth")
    bench = harness.Bench(harness.PRESETS["tiny"], seed=0)
    return {name: arm(bench) for name, arm in growth.REPRODUCTION.arms.items()}


def test_a_grown_model_starts_near_the_small_one_and_below_random(figures):
    for name in ("FPI", "FPI, uneven", "AKI-Pro"):
        row = figures[name]
        assert row["at_start"] == pytest.approx(row["small_model"], rel=0.01)
        assert row["at_start"] < figures["random"]["at_start"]


def test_every_arm_is_trained_and_random_gets_more_steps_for_the_small_models_compute(figures):
    for row in figures.values():
        assert math.isfinite(row["bits_per_byte"]) and row["bits_per_byte"] < row["at_start"]
    more, random = (figures[name]["bits_per_byte"] for name in ("random, and the small one's compute", "random"))
    assert more < random
