"""`hf-moe compare`: two models, or two texts; bad input is one sentence before anything is written."""

import json

import pytest
import torch
from common.tiny_families import tiny_model

import hf_moe
from hf_moe.cli import main


TEXT = "The river runs past the old mill.\n\nA miller kept three cats,\nand the cats kept the mice away.\n"


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    model = tiny_model("qwen3_moe", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        view = hf_moe.moe_layers(model)[1]
        view.router.weight.copy_(view.router.weight.roll(1, dims=0))
    model.save_pretrained(tmp_path / "b")
    for name in ("a", "b"):
        tiny_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "code.txt").write_text("def add(a, b):\n    return a + b\n")
    return tmp_path


def compare(folder, *words):
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    return main(["compare", *words, "--output", str(folder / "shift"), "--device", "cpu"])


def test_two_models_are_compared_on_one_text(folder, capsys):
    assert compare(folder, "a", "b", "--text", "text.txt") == 0
    content = json.loads((folder / "shift" / "shift.json").read_text())
    assert (content["name_a"], content["name_b"], content["paired"]) == ("a", "b", True)
    assert content["layers"][0]["selection_shift"] == 0  # below the layer that was changed
    assert content["layers"][1]["selection_shift"] > 0.1
    printed = capsys.readouterr().out
    assert "| model.layers.1.mlp | 8 |" in printed and "shift.md" in printed


def test_one_model_is_compared_on_two_texts(folder):
    assert compare(folder, "a", "--text", "text.txt", "--other-text", "code.txt", "--max-tokens", "12") == 0
    content = json.loads((folder / "shift" / "shift.json").read_text())
    assert content["paired"] is False and content["tokens_a"] == 12
    assert content["name_a"].endswith("text.txt") and content["name_b"].endswith("code.txt")


@pytest.mark.parametrize("words", [[], ["b", "--other-text", "code.txt"]], ids=["neither", "both"])
def test_exactly_one_other_side_is_needed(folder, words, capsys):
    assert compare(folder, "a", *words, "--text", "text.txt") == 2
    error = capsys.readouterr().err
    assert "needs a second model B or `--other-text`, got " in error and error.count("\n") == 1
    assert not (folder / "shift").exists()


def test_an_empty_other_text_is_named(folder, capsys):
    (folder / "code.txt").write_text(" \n")
    assert compare(folder, "a", "--text", "text.txt", "--other-text", "code.txt") == 2
    assert "`--other-text`" in capsys.readouterr().err
    assert not (folder / "shift").exists()


def test_tokenizers_that_differ_are_refused(folder, tiny_tokenizer, capsys):
    tiny_tokenizer.add_tokens(["mill"])
    tiny_tokenizer.save_pretrained(folder / "b")
    model = tiny_model("qwen3_moe", num_hidden_layers=2, vocab_size=400)
    model.save_pretrained(folder / "b")
    assert compare(folder, "a", "b", "--text", "text.txt") == 2
    assert "have tokenizers that read `--text` differently" in capsys.readouterr().err
    assert not (folder / "shift").exists()


def test_a_missing_second_model_is_refused(folder, capsys):
    assert compare(folder, "a", "./nowhere", "--text", "text.txt") == 2
    assert "MODEL './nowhere' is not a folder" in capsys.readouterr().err
