"""The PILL example: its questions, its table, and a smallest run on toy data."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common.toy_pictures import write_toy_pictures


FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    loaded = {}
    for name in ("fashion_mnist", "pill"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    yield loaded["pill"]
    for name in loaded:
        del sys.modules[name]


@pytest.fixture
def toy(tmp_path):
    return write_toy_pictures(tmp_path)


def test_questions_have_the_answers_the_pictures_give(example):
    _, tokenizer = example.load_base(example.parse_arguments(["--model", "small"]))
    source = example.Mosaics(torch.arange(10.0)[:, None], torch.arange(10))
    batch = example.make_batch(source, tokenizer, 64, np.random.default_rng(0), captions=0.3)
    assert batch.pictures.shape == (64, 4, 1) and set(batch.kinds) == {"caption", "place", "pair"}
    for row, kind in enumerate(batch.kinds):
        words = [example.WORDS[int(value)] for value in batch.pictures[row, :, 0]]
        prompt, answer = batch.prompts[row], batch.answers[row]
        prompt = tokenizer.decode(prompt[prompt > 0])
        answer = tokenizer.decode(answer[answer >= 0]).replace(" ,", ",")
        if kind == "caption":
            assert prompt == "" and answer == ", ".join(words)
        elif kind == "place":
            assert answer == words[example.PLACES.index(prompt.removeprefix("What is ").removesuffix(" ?"))]
        else:
            side = prompt.removeprefix("What is ").removesuffix(" ?")
            assert answer == ", ".join(words[place] for place in example.PAIRS[side])


def test_words_stand_for_pictures_in_questions_about_text(example):
    _, tokenizer = example.load_base(example.parse_arguments(["--model", "small"]))
    source = example.Mosaics(torch.zeros(3, 1), torch.tensor([4, 4, 4]))
    batch = example.make_batch(source, tokenizer, 3, np.random.default_rng(0), captions=0.0, words=True)
    assert batch.pictures is None
    assert all(tokenizer.decode(row[row > 0]).startswith("coat coat coat coat What is") for row in batch.prompts)


def test_all_methods_are_trained_and_compared(example, toy, tmp_path, capsys):
    options = (
        "--text-steps 3 --align-steps 2 --steps 2 --batch-size 4 --held-out 8 --rank 2 --text-share 0.5 --seeds 0 1"
    )
    result = example.main(["--data", str(toy), "--output", str(tmp_path / "out"), *options.split()])
    assert [(row["method"], row["seed"]) for row in result["rows"]] == [
        (m, s) for s in (0, 1) for m in example.METHODS
    ]
    assert result["fresh_is_base"] and example.aligned_is_base(result)
    for row in result["rows"]:
        assert len(row["losses"]) == 4 and 0 <= row["place"] <= 1 and row["text perplexity"] > 0
        assert (row["gate"] is None) == (row["method"] not in ("PILL", "one adapter for both"))
        if row["method"] == "projector only":
            assert row["text perplexity"] == result["base"]["perplexity"]
    # the same seed, batches and projector for all: only the adapters differ in the first loss, and those are fresh
    assert len({row["losses"][0] for row in result["rows"] if row["seed"] == 0}) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out" / "results.png").stat().st_size > 0
    assert (tmp_path / "out" / "results.md").read_text() in capsys.readouterr().out
