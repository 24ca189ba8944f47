import importlib.util
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "moe_plus_plus.py"
    spec = importlib.util.spec_from_file_location("moe_plus_plus_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALLEST = (
    "--implementations grouped_mm --tokens 16 --rounds 2 --warmup 0 "
    "--hidden 32 --intermediate 16 --experts 8 --taus 0.25 0.75"
).split()


def test_benchmark_writes_table_json_and_figure(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    rows = benchmark.main([*SMALLEST, "--output", str(tmp_path)])
    assert torch.get_num_threads() == threads
    assert len(rows) == 2 * 2 * 2
    assert len(capsys.readouterr().out.strip().splitlines()) == 2 + len(rows)
    written = json.loads((tmp_path / "moe_plus_plus.json").read_text())
    assert [row["cpu_ratio"] for row in written["rows"]] == [row["cpu_ratio"] for row in rows]
    assert (tmp_path / "moe_plus_plus.png").stat().st_size > 0
    for row in rows:
        assert row["cpu_ratio"] > 0 and row["cpu_quartiles"][0] <= row["cpu_ratio"] <= row["cpu_quartiles"][1]
        # 8 + 4 experts: tau .25 gives 2 / 6 of the slots to feed-forward experts, tau .75 gives 6 / 10
        assert abs(row["ffn_share"] - {0.25: 1 / 3, 0.75: 0.6}[row["tau"]]) < 0.03
        assert row["ffn_share"] * row["ideal"] == pytest.approx(1.0, abs=0.1)
        extra = 2 * 32 + 4 * 32 + 4 * 32 + 12 * 12 + 12  # constants, their gates, router rows, residual map, bias
        assert row["parameters"] == row["parameters_plain"] + extra


def test_bad_numbers_of_rounds_are_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "0"])
    assert "`--rounds` must be at least 1" in capsys.readouterr().err
