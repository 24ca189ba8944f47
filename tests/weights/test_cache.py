import os
import time

import pytest

from hf_moe.weights.cache import building, default_cache_dir, find_damage, write_manifest


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_cache_lies_beside_the_hubs():
    from huggingface_hub import constants

    assert default_cache_dir().parent == type(default_cache_dir())(constants.HF_HUB_CACHE).parent


def test_a_finished_build_is_there_and_nothing_else(tmp_path):
    with building(tmp_path / "deep" / "entry") as folder:
        (folder / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "entry").exists()
    assert names(tmp_path / "deep") == ["entry"]
    assert names(tmp_path / "deep" / "entry") == ["a.txt"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_build_leaves_nothing(tmp_path, end):
    with pytest.raises(end), building(tmp_path / "entry") as folder:
        (folder / "half").write_text("x")
        raise end
    assert names(tmp_path) == []


def test_an_interrupted_replacement_keeps_the_old_entry(tmp_path):
    with building(tmp_path / "entry") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "entry", replace=True) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "entry" / "a").read_text() == "old"
    assert names(tmp_path) == ["entry"]


def test_a_replacement_leaves_only_the_new_files(tmp_path):
    for file in ("old", "new"):
        with building(tmp_path / "entry", replace=True) as folder:
            (folder / file).write_text(file)
    assert names(tmp_path / "entry") == ["new"]
    assert names(tmp_path) == ["entry"]


def test_an_existing_folder_is_not_replaced_unasked(tmp_path):
    (tmp_path / "entry").mkdir()
    with pytest.raises(ValueError, match="exists already"), building(tmp_path / "entry"):
        pass


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write in"), building(tmp_path / "file" / "entry"):
        pass


def test_leftovers_of_killed_builds_go_after_a_day(tmp_path):
    for name, age in (("fresh", 60), ("stale", 3 * 24 * 3600)):
        leftover = tmp_path / f".entry.partial-{name}"
        leftover.mkdir()
        os.utime(leftover, (time.time() - age,) * 2)
    with building(tmp_path / "entry"):
        pass
    assert names(tmp_path) == [".entry.partial-fresh", "entry"]


@pytest.fixture
def entry(tmp_path):
    with building(tmp_path / "entry") as folder:
        (folder / "weights").write_bytes(bytes(100))
        write_manifest(folder)
    return tmp_path / "entry"


def test_an_intact_entry_has_no_damage(entry):
    assert find_damage(entry) is None


def test_truncation_is_found(entry):
    (entry / "weights").write_bytes(bytes(99))
    assert find_damage(entry) == "`weights` has 99 bytes instead of 100"


def test_one_changed_byte_is_found(entry):
    (entry / "weights").write_bytes(bytes(99) + b"\1")
    assert find_damage(entry) == "the content of `weights` has changed"


def test_a_missing_file_is_found(entry):
    (entry / "weights").unlink()
    assert find_damage(entry) == "`weights` is missing"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weights": {}}', '{"weights": 3}'])
def test_a_broken_manifest_is_damage(entry, content):
    (entry / "manifest.json").write_text(content)
    assert "`manifest.json` cannot be read" in find_damage(entry)
