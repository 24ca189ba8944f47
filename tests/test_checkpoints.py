import json

import pytest
import torch
from safetensors.torch import save_file

from hf_moe.checkpoints import CheckpointReader, CheckpointWriter


TENSORS = {f"t{i}": torch.full((4, 8), float(i)) for i in range(5)}  # 128 bytes each


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(10_000, 1), (640, 1), (639, 2), (256, 3), (1, 5)])
def test_what_was_written_is_read_again(max_shard_bytes, shards, tmp_path):
    with CheckpointWriter(tmp_path / "out", max_shard_bytes) as writer:
        (writer.partial / "config.json").write_text("{}")
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        assert not (tmp_path / "out").exists()
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == shards and (tmp_path / "out" / "config.json").is_file()
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.is_file() == (shards > 1)
    if shards > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"].keys() == TENSORS.keys() and set(content["weight_map"].values()) == set(files)
        assert content["metadata"]["total_size"] == 640
    reader = CheckpointReader(tmp_path / "out")
    assert reader.keys() == TENSORS.keys() and "t0" in reader and "other" not in reader
    assert all(torch.equal(reader[name], tensor) for name, tensor in TENSORS.items())


def test_the_folder_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").mkdir()
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", torch.ones(1))
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", 1) as writer:
        writer.add("a", torch.ones(1))
        writer.add("b", torch.ones(1))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_exist_and_a_full_one_may_not(tmp_path):
    (tmp_path / "out").mkdir()
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", torch.ones(1))
    with pytest.raises(ValueError, match="exists already"):
        CheckpointWriter(tmp_path / "out")


def test_a_tensor_is_added_once(tmp_path):
    with pytest.raises(ValueError, match="`a` was added"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"), CheckpointWriter(tmp_path / "file" / "out"):
        pass


def test_bad_shard_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_shard_bytes` must be at least 1, got 0"):
        CheckpointWriter(tmp_path / "out", 0)


def test_missing_tensors_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        CheckpointReader(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no weights"):
        CheckpointReader(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks the tensor `b`"):
        CheckpointReader(tmp_path)["b"]


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}])
def test_bin_files_that_hold_no_tensors_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds something else than named tensors"):
        CheckpointReader(tmp_path)


def test_a_broken_bin_index_is_named(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a weight index"):
        CheckpointReader(tmp_path)
