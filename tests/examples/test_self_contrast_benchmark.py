import importlib.util
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "self_contrast.py"
    spec = importlib.util.spec_from_file_location("self_contrast_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_writes_a_table_and_json(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    rows = benchmark.main(
        "--layers 2 --hidden 192 --experts 4 --vocabulary 128 --prompt 5 --new-tokens 3 --rounds 2 "
        f"--output {tmp_path}".split()
    )
    assert torch.get_num_threads() == threads
    assert [(row["dtype"], row["implementation"]) for row in rows] == [
        (dtype, name) for dtype in ("bfloat16", "float32") for name in ("grouped_mm", "hf_moe")
    ]
    table = capsys.readouterr().out
    for row in rows:
        assert f"| {row['dtype']} | {row['implementation']} |" in table
        assert row["fused_range"][0] <= row["fused"] <= row["fused_range"][1]
        assert 0 <= row["unchosen_share"] <= 1
        width = 2 if row["dtype"] == "bfloat16" else 4
        assert row["cache"] == 2 * 2 * (5 + 3 - 1) * 64 * width  # layers, keys and values, tokens, one head of 64
    assert json.loads((tmp_path / "self_contrast.json").read_text())["rows"] == rows


def test_a_weak_stream_that_routes_as_the_model_does_chooses_nothing_else(benchmark):
    model = benchmark.random_model(2, 4, 192, 128, torch.float32)
    prompt = torch.arange(3, 9)[None]
    assert benchmark.unchosen_share(model, prompt, 4, "top:2") == 0
    assert benchmark.unchosen_share(model, prompt, 4, "rank:4") > 0.4
