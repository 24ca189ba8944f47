import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def figures():
    harness, mote = load_example("reproductions/harness"), load_example("reproductions/mote")
    bench = harness.Bench(harness.PRESETS["tiny"], seed=0)
    return {name: arm(bench) for name, arm in mote.REPRODUCTION.arms.items()}


def test_ternary_experts_take_an_eighth_of_the_memory(figures):
    full, ternary = (figures[name]["experts_mib"] for name in ("4 experts", "4 ternary"))
    assert ternary == pytest.approx(full / 8, rel=0.02)  # the scales are what is more
    assert figures["8 ternary"]["experts_mib"] == pytest.approx(figures["1 expert"]["experts_mib"], rel=0.02)


def test_rounding_afterwards_changes_what_the_same_experts_say(figures):
    assert figures["4 rounded afterwards"]["bits_per_byte"] != figures["4 experts"]["bits_per_byte"]
    assert all(0 < row["bits_per_byte"] < 10 for row in figures.values())
