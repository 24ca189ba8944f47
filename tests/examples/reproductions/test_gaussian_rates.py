import json

import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def rates():
    return load_example("reproductions/gaussian_rates")


def test_one_command_writes_tables_and_plots(rates, tmp_path, capsys):
    found = rates.main(["--preset", "tiny", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "exact.png",
        "gates.png",
        "overspecified.png",
        "rates.json",
        "rates.md",
    }
    written = json.loads((tmp_path / "rates.json").read_text())
    assert [len(written[name]) for name in ("exact", "overspecified", "gates")] == [3, 2, 3]
    table = (tmp_path / "rates.md").read_text()
    for studies in found.values():
        for study in studies:
            slope = study.slope(next(iter(study.errors)))
            assert f"| {study.name} |" in table and f"{slope.value:.3f}" in table
    assert "line from n =" in capsys.readouterr().out


def test_an_arm_measures_the_slopes_of_its_gate_with_its_seed(rates):
    harness = load_example("reproductions/harness")
    figures = [rates.REPRODUCTION.arms["tanh"](harness.Bench(harness.PRESETS["tiny"], seed)) for seed in (0, 0, 1)]
    assert figures[0] == figures[1] != figures[2]
    assert rates.REPRODUCTION.metric in figures[0] and set(rates.REPRODUCTION.arms) == set(rates.GATES)


def test_no_number_is_expected_of_the_gate_under_a_linear_score(rates):
    linear, *others = rates.gate_experiments()
    assert "gate_weight" not in linear.theory and all(each.theory["gate_weight"] == -0.5 for each in others)
