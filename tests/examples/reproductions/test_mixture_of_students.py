import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def figures():
    harness, module = load_example("reproductions/harness"), load_example("reproductions/mixture_of_students")
    bench = harness.Bench(harness.PRESETS["tiny"], seed=0)
    return {name: arm(bench) for name, arm in module.REPRODUCTION.arms.items()}


def test_students_have_fewer_layers_than_the_teacher(figures):
    assert figures["teacher"]["layers"] == 2
    assert all(row["layers"] == 1 for name, row in figures.items() if name != "teacher")


def test_arms_differ(figures):
    losses = [row["bits_per_byte"] for row in figures.values()]
    assert len(set(losses)) == len(losses) and all(0 < loss < 10 for loss in losses)
