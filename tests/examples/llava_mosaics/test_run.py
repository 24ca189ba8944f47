"""The whole command on noise with random tiny models; a second run finds everything done."""

import json

import pytest
import torch
from common.tiny_training import third_party_warnings


pytestmark = third_party_warnings


def test_all_arms_are_trained_measured_and_kept(example, toy, tmp_path, capsys):
    words = ["--images", str(toy), "--preset", "tiny", "--output", str(tmp_path / "out")]
    result = example["run"].main(words)
    assert [row["arm"] for row in result["rows"]] == list(example["stages"].ARMS)
    for row in result["rows"]:
        assert set(row["new pictures"]) == set(example["figures"].COLUMNS)
        sparse = row["arm"] != "dense, supervised"
        assert (row["activated"] < row["parameters"]) == sparse == ("routes" in row)
        if sparse:
            (layer,) = row["routes"].values()
            assert sum(layer["image"]) == pytest.approx(1) and sum(layer["text"]) == pytest.approx(1)
    for name in ("results.png", "experts.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out" / "results.md").read_text() in capsys.readouterr().out
    assert example["run"].main(words)["rows"] == result["rows"]
    assert "trained" not in capsys.readouterr().out


def test_students_keep_layers_and_their_weights(example, tmp_path):
    example["tower"].make_tower(32, 2).save_pretrained(tmp_path)
    teacher, _ = example["models"].make_llava(tmp_path, "random", 0)
    student = example["models"].shallow(teacher, (0, 3))
    language, other = student.model.language_model, teacher.model.language_model
    for new, old in ((0, 0), (1, 3)):
        one, theirs = language.layers[new].state_dict(), other.layers[old].state_dict()
        assert all(torch.equal(one[name], theirs[name]) for name in theirs)
    assert [layer.self_attn.layer_idx for layer in language.layers] == [0, 1]
    assert teacher.config.text_config.num_hidden_layers == 4
    weights = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if "language_model.layers" not in name:
            assert torch.equal(tensor, weights[name]), name
