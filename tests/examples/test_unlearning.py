import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_moe.trainers import ExpertUnlearningConfig


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    yield importlib.import_module("unlearning")
    for name in ("unlearning", "domain_moe"):
        sys.modules.pop(name, None)


@pytest.fixture
def toy(example, tiny_tokenizer_dir):
    """A random model of two layers, four lines of text and two steps."""
    import domain_moe

    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    rivers = [f"The river number {i} runs past the old mill and down to the sea." for i in range(30)]
    cats = [f"A miller kept {i} cats, and the cats kept the mice away." for i in range(30)]
    return {
        "source": (LlamaForCausalLM(config), AutoTokenizer.from_pretrained(tiny_tokenizer_dir)),
        "texts": {"rivers": (rivers, rivers[:6]), "arithmetic": (cats, cats[:6])},
        "model_settings": domain_moe.Settings(
            num_experts=4, layers=(1,), train_from=1, steps=2, length=16, held_out_blocks=1, problems=0
        ),
        "settings": example.Settings(steps=2, evaluate_every=1, batch_size=2, length=16, blocks=6, held_out_blocks=3),
    }


def test_methods_run_and_finished_runs_are_not_repeated(example, toy, tmp_path, monkeypatch, capsys):
    words = ["--forget", "rivers", "--seeds", "0", "--models", str(tmp_path / "models"), "--output", str(tmp_path)]
    methods = ["whole model", "expert", "other expert", "expert, RMU"]
    words += ["--rates-whole", "1e-4", "1e-3", "--methods", *methods]
    rows = example.main(words, **toy)
    assert [row["method"] for row in rows] == methods
    assert len(list((tmp_path / "runs").iterdir())) == 2 + 3
    by_method = {row["method"]: row for row in rows}
    assert by_method["expert"]["targets"] != by_method["other expert"]["targets"]
    assert by_method["expert"]["targets"].keys() == by_method["other expert"]["targets"].keys()
    assert by_method["whole model"]["trained_parameters"] > by_method["expert"]["trained_parameters"]
    for row in rows:
        assert len(row["curve"]) == 2 and row["balance"] == max(point["balance"] for point in row["curve"])
        assert row["start"] == pytest.approx(rows[0]["start"], rel=1e-4)
    assert (tmp_path / "unlearning.png").stat().st_size > 10_000
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and all(f"| {method} |" in table for method in methods)
    assert json.loads((tmp_path / "unlearning.json").read_text())["rows"] == rows
    monkeypatch.setattr(example, "unlearn", None)
    assert example.main(words, **toy) == rows


def test_every_method_has_arguments_that_are_allowed(example, tmp_path):
    for options in example.METHODS.values():
        ExpertUnlearningConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_claims_are_judged_seed_by_seed(example):
    rows = [
        {"method": method, "seed": seed, "balance": balance}
        for method, balances in {"expert": (0.5, 0.6), "whole model": (0.4, 0.5), "routers frozen": (0.6, 0.5)}.items()
        for seed, balance in enumerate(balances)
    ]
    first, second = example.orderings(rows)
    assert "one expert keeps more than the whole model: appears (2 of 2 seeds; balance +0.100, +0.100)" in first
    assert "is mixed (1 of 2 seeds; balance -0.100, +0.100)" in second
