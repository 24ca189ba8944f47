import json

import pytest
from common.examples import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("comet_bert")


def test_every_method_is_distilled_from_the_same_bert(example, tmp_path, capsys):
    rows = example.main(["--preset", "test", "--seeds", "3", "--output", str(tmp_path)])
    assert [(row["method"], row["seed"]) for row in rows] == [(name, 3) for name in example.METHODS]
    used = {row["method"]: row["experts"] for row in rows}
    assert used["one expert"] == used["hash (MoEBERT)"] == used["top-1"] == 1.0 <= used["COMET"] <= 4.0
    assert all(0 <= row["accuracy"] <= 1 and row["distance"] > 0 for row in rows)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == rows and len(written["teachers"]) == 1
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_the_table_gives_means_spreads_and_paired_differences(example):
    base = {"before": 0.5, "distance": 1.0, "experts": 1.0, "seconds": 2.0}
    accuracies = {name: (0.50, 0.60) for name in example.METHODS} | {"COMET": (0.55, 0.58)}
    rows = [
        {"method": name, "seed": seed, "accuracy": value, **base}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    table = example.summarise(rows, [0.7, 0.7])
    assert "| BERT | 0.700 ± 0.000 |" in table and "| COMET | 0.500 ± 0.000 | 0.565 ± 0.021 |" in table
    assert "- COMET minus top-1: +0.050, -0.020" in table and "- COMET+ minus top-1: +0.000, +0.000" in table


def test_held_out_passages_are_balanced_and_of_other_documents(example):
    data = example.make_data(example.PRESETS["test"])
    assert len(data.train) == 5 * 60 and set(data.held_out) == {"input_ids", "labels"}
    seen = {tuple(row["input_ids"].tolist()) for row in data.train}
    fresh = [tuple(ids) not in seen for ids in data.held_out["input_ids"].tolist()]
    assert sum(fresh) > 0.95 * len(fresh)
    assert (data.held_out["input_ids"][:, 0] == data.tokenizer.cls_token_id).all()
