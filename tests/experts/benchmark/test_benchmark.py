"""`hf-moe bench experts`: what is measured, how it is reported, and what `--tune` keeps."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from hf_moe import cli
from hf_moe.experts.benchmark import Geometry, compare, markdown_table, plot, tuning
from hf_moe.experts.benchmark.geometry import GEOMETRIES, geometry_of_config, make_experts, make_routing
from hf_moe.experts.benchmark.measure import Comparison
from hf_moe.experts.kernels import selection


TINY = Geometry("tiny", 16, 32, 4, 2)
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "default_cache_dir", lambda: tmp_path)
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    selection.load_table.cache_clear()
    yield
    selection.load_table.cache_clear()


def test_ratios_are_taken_within_rounds():
    seconds = {"grouped_mm": [1.0, 10.0, 100.0], "hf_moe": [0.5, 6.0, 70.0], "eager": [9.0, 99.0, 999.0]}
    cell = Comparison(TINY, "float32", "inference", 4, {**seconds, "limit": [0.25, 3.0, 35.0]}, "decode")
    assert cell.best_of_transformers == "grouped_mm"
    assert cell.ratio("hf_moe") == 0.6
    assert cell.ratio("limit", "hf_moe") == 0.5
    assert "| 0.60 | decode | 50 % |" in markdown_table([cell])


@pytest.mark.parametrize("training", [False, True])
def test_every_round_times_every_implementation(training):
    cell = compare(["hf_moe", "hf_moe_exact"], TINY, torch.float32, tokens=3, training=training, rounds=2)
    assert set(cell.seconds) == {"eager", "batched_mm", "grouped_mm", "hf_moe", "hf_moe_exact", "limit"}
    assert all(len(times) == 2 and min(times) > 0 for times in cell.seconds.values())
    assert cell.regime == ("training" if training else "inference")


def test_every_call_has_a_routing_of_its_own():
    generator = torch.Generator().manual_seed(0)
    first, second = (make_routing(TINY, 50, torch.float32, generator) for _ in range(2))
    assert not torch.equal(first[1], second[1])


def test_a_models_config_gives_its_geometry(tiny_llama_config):
    from transformers import MixtralConfig, Qwen3MoeConfig

    assert geometry_of_config(MixtralConfig(), "m")[1:] == (4096, 14336, 8, 2)
    assert geometry_of_config(Qwen3MoeConfig(), "q")[1:] == (2048, 768, 128, 8)
    with pytest.raises(ValueError, match=r"`--model dense`.*experts"):
        geometry_of_config(tiny_llama_config, "dense")


def test_the_command_prints_a_table_and_draws_it(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plot.png"
    words = ["bench", "experts", "--geometry", "tiny", "--tokens", "2", "--rounds", "1", "--plot", str(picture)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "| tiny 16/32 E4 k2 | bfloat16 | inference | 2 |" in printed
    assert printed.count("| tiny") == 1, "a cell of two regimes is measured once"
    assert picture.stat().st_size > 0
    assert torch.get_num_threads() >= 1


def test_explain_says_which_path_runs_and_where_that_comes_from(capsys):
    assert cli.main(["bench", "experts", "--geometry", "tiny", "--explain", "--regime", "decode", "train"]) == 0
    printed = capsys.readouterr().out
    assert "selection: defaults" in printed and "compiled operator" in printed
    assert "inference, 1 tokens: decode" in printed


def test_tune_keeps_a_table_that_is_used(monkeypatch, capsys):
    monkeypatch.setattr(tuning, "compiler", lambda: None)
    monkeypatch.setattr(tuning, "LADDERS", {False: (1, 4), True: (4,)})
    monkeypatch.setattr(tuning.tune, "__defaults__", ((TINY,), (torch.float32,), 1, lambda line: None))
    assert cli.main(["bench", "experts", "--tune"]) == 0
    stored = json.loads(selection.table_path().read_text())
    assert set(stored["rules"]) == {"float32/inference", "float32/training"}
    assert stored["rules"]["float32/training"][0][1] == "grouped_mm", "few rows are not worth another path"
    torch.set_num_threads(1)
    selection.load_table.cache_clear()
    assert selection.load_table().source == str(selection.table_path())
    assert capsys.readouterr().out.startswith("Selection table: ")


def test_limits_lie_between_sizes_whose_winners_differ():
    assert tuning._rule((1, 4, 16), ("a", "a", "a")) == ((math.inf, "a"),)
    assert tuning._rule((1, 4, 16), ("a", "b", "b")) == ((2.0, "a"), (math.inf, "b"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--geometry", "nothing"], "`--geometry` must be among"),
        (["--implementations", "nothing"], "`--implementations` must be among"),
        (["--rounds", "0"], "`--rounds` must be at least 1"),
        (["--tokens", "0"], "`--tokens` must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(words, message, capsys):
    assert cli.main(["bench", "experts", *words]) == 2
    assert message in capsys.readouterr().err


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="not in a checkout")
def test_the_example_writes_its_results(tmp_path, monkeypatch, capsys):
    script = example("experts")
    monkeypatch.setitem(GEOMETRIES, "C", TINY)
    assert script.main(["--quick", "--rounds", "1", "--no-compiled", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "experts.json").read_text())
    assert len(results["cells"]) == 6
    assert results["training memory"]["bfloat16"]["hf_moe"] > 0
    assert (tmp_path / "experts.md").read_text().startswith("| bank |")


@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="not in a checkout")
@pytest.mark.filterwarnings("ignore")
def test_the_end_to_end_example_prints_tokens_per_second(capsys):
    words = "--layers 1 --vocabulary 64 --rounds 1 --new-tokens 2 --steps 1 --batch 1 --length 8".split()
    assert example("experts_end_to_end").main(words) == 0
    assert "| hf_moe | " in capsys.readouterr().out


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf-moe\[demo\]"):
        plot([], "x.png")


def test_banks_have_the_shapes_they_are_named_for():
    assert make_experts(TINY, torch.float32).gate_up_proj.shape == (4, 64, 16)


def test_gradients_of_few_rows_are_left_to_transformers_unless_something_is_safely_faster():
    compiled, exact, theirs = (((math.inf, name),) for name in ("compiled", "exact", "grouped_mm"))
    few = (24.0, "grouped_mm")
    assert tuning._leave_few_rows(compiled, torch.float32) == compiled
    assert tuning._leave_few_rows(compiled, torch.bfloat16) == (few, *compiled)
    assert tuning._leave_few_rows(exact, torch.float32) == (few, *exact)
    assert tuning._leave_few_rows(theirs, torch.float32) == theirs
