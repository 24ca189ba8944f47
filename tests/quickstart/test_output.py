import os

import pytest

from hf_moe.quickstart.output import output_folder


def write_results(folder, text):
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text(text)
    (folder / "results.json").write_text(text)


def test_results_appear_together_at_the_end(tmp_path):
    with output_folder(tmp_path / "a" / "out") as folder:
        write_results(folder, "x")
        assert not (tmp_path / "a" / "out" / "results.json").exists()
    assert sorted(os.listdir(tmp_path / "a" / "out")) == ["model", "results.json"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_an_early_end_leaves_no_folder(tmp_path, end):
    with pytest.raises(end), output_folder(tmp_path / "a" / "out") as folder:
        write_results(folder, "x")
        raise end
    assert os.listdir(tmp_path) == []


def test_an_early_end_keeps_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_earlier_results_are_not_replaced_unasked(tmp_path):
    with output_folder(tmp_path) as folder:
        write_results(folder, "old")
    with (
        pytest.raises(ValueError, match=r"already holds `model`, `results\.json`.*--overwrite"),
        output_folder(tmp_path),
    ):
        pass


def test_overwriting_replaces_results_and_nothing_else(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for text in ("old", "new"):
        with output_folder(tmp_path, overwrite=True) as folder:
            write_results(folder, text)
            (folder / "model" / text).write_text("")
    assert sorted(os.listdir(tmp_path)) == ["mine", "model", "results.json"]
    assert sorted(os.listdir(tmp_path / "model")) == ["new", "weights"]


def test_an_interrupted_overwrite_keeps_the_old_results(tmp_path):
    with output_folder(tmp_path) as folder:
        write_results(folder, "old")
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path, overwrite=True) as folder:
        write_results(folder, "new")
        raise KeyboardInterrupt
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["model", "results.json"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=r"cannot be written.*Choose a folder"), output_folder(output):
            pass
    assert os.listdir(tmp_path) == ["file"]
