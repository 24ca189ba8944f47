import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "moe_plus_plus_against_top2.py"
    spec = importlib.util.spec_from_file_location("moe_plus_plus_against_top2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_methods_are_trained_and_compared_seed_by_seed(
    example, tmp_path, tiny_llama_config, tiny_tokenizer, capsys
):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The river number {i} runs past the old mill and down to the sea." for i in range(200))
    )
    options = (
        f"--layers all --experts 4 --steps 3 --sequence-length 32 --held-out-tokens 256 --output {tmp_path / 'out'}"
    )
    rows = example.main(
        ["--model", str(tmp_path / "dense"), "--text", str(text), "--seeds", "0", "1", *options.split()]
    )
    assert [(row["method"], row["seed"]) for row in rows] == [("top-2", 0), ("MoE++", 0), ("top-2", 1), ("MoE++", 1)]
    assert all(row["perplexity"] < row["before"] for row in rows)
    assert all(row["ffn_experts"] == 2 for row in rows if row["method"] == "top-2")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["rows"] == rows
    assert (tmp_path / "out" / "results.png").stat().st_size > 0
    assert (tmp_path / "out" / "results.md").read_text() in capsys.readouterr().out


def test_the_table_gives_means_spreads_and_paired_differences(example):
    base = {"ffn_experts": 2.0, "seconds": 1.0}
    rows = [
        {"method": method, "seed": seed, "perplexity": value, **base}
        for method, values in {"top-2": (10.0, 12.0), "MoE++": (9.0, 12.5)}.items()
        for seed, value in enumerate(values)
    ]
    table = example.summarise(rows, dense=20.0)
    assert "| top-2 | 11.000 ± 1.414 |" in table
    assert "-1.000, +0.500; MoE++ is lower with 1 of 2 seeds" in table
