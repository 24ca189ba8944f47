"""The benchmark of skipped computation at its smallest setting."""

import json

import pytest
import torch
from common.examples import load_example


SMALLEST = "--tokens 256 --experts 8 --hidden 64 --intermediate 96 --rounds 3 --warmup 1 --modes forward".split()


@pytest.fixture(scope="module")
def benchmark():
    return load_example("benchmarks/active_experts")


def test_operations_and_time_fall_with_the_experts_in_use(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    rows = benchmark.main([*SMALLEST, "--output", str(tmp_path)])
    assert torch.get_num_threads() == threads
    assert len(rows) == 3 * 5 and len(capsys.readouterr().out.strip().splitlines()) == 2 + len(rows)
    written = json.loads((tmp_path / "active_experts.json").read_text())
    assert [row["flops"] for row in written["rows"]] == [row["flops"] for row in rows]
    assert (tmp_path / "active_experts.png").stat().st_size > 0
    for router in benchmark.SETTINGS:
        mine = [row for row in rows if row["router"] == router]
        active = [row["active_experts"] for row in mine]
        assert active == sorted(active) and active[0] <= 2 and active[-1] == 8
        for row in mine:
            assert row["flops"] == pytest.approx(row["active_experts"] * 256 * 3 * 2 * 64 * 96)
        assert mine[0]["time_ratio"] < 0.8  # a quarter of the products, or less
        assert mine[-1]["time_ratio"] == 1.0


def test_bad_numbers_of_rounds_are_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "0"])
    assert "`--rounds` must be at least 1" in capsys.readouterr().err
