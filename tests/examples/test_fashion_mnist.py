import gzip
import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "fashion_mnist.py"
    spec = importlib.util.spec_from_file_location("fashion_mnist", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def idx(values):
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def pictures():
    draw = np.random.default_rng(0)
    return {
        f"{split}-{kind}": values
        for split, count in (("train", 6), ("t10k", 3))
        for kind, values in (
            ("images-idx3-ubyte", draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1-ubyte", draw.integers(0, 10, count, dtype=np.uint8)),
        )
    }


def write(folder, pictures, packed):
    for name, values in pictures.items():
        content = idx(values)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content)) if packed else (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_plain_files_give_the_same(example, pictures, tmp_path, packed):
    write(tmp_path, pictures, packed)
    data = example.load(tmp_path)
    assert np.array_equal(data.train_images, pictures["train-images-idx3-ubyte"])
    assert np.array_equal(data.train_labels, pictures["train-labels-idx1-ubyte"])
    assert np.array_equal(data.test_images, pictures["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.test_labels, pictures["t10k-labels-idx1-ubyte"])
    assert data.train_images.flags.writeable


def test_a_missing_file_is_named_with_the_ways_to_get_it(example, pictures, tmp_path):
    del pictures["t10k-labels-idx1-ubyte"]
    write(tmp_path, pictures, True)
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte.*dataset-fashion-mnist") as caught:
        example.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and example.HUB in str(caught.value)


def test_damaged_and_foreign_files_are_refused(example, pictures, tmp_path):
    write(tmp_path, pictures, False)
    path = tmp_path / "train-images-idx3-ubyte"
    for content, message in (
        (path.read_bytes()[:-1], "has 4703 bytes"),
        (b"PNG" + path.read_bytes(), "no idx file"),
        (idx(pictures["train-images-idx3-ubyte"][:, :14]), "not Fashion-MNIST"),
        (idx(pictures["train-images-idx3-ubyte"][:-1]), "not Fashion-MNIST"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            example.load(tmp_path)
    path.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"0" * 1000)[:-9])
    with pytest.raises(ValueError, match="damaged"):
        example.load(tmp_path)


def test_labels_beyond_the_ten_classes_are_refused(example, pictures, tmp_path):
    pictures["t10k-labels-idx1-ubyte"] = np.full(3, 10, dtype=np.uint8)
    write(tmp_path, pictures, True)
    with pytest.raises(ValueError, match="label 10"):
        example.load(tmp_path)


def test_the_command_counts_the_classes(example, pictures, tmp_path, capsys):
    pictures["train-labels-idx1-ubyte"] = np.array([9, 9, 9, 9, 9, 0], dtype=np.uint8)
    write(tmp_path, pictures, True)
    example.main(["--data", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "train: 6 pictures" in printed and "ankle boot     5" in printed


def test_the_hubs_tables_give_the_same(example, pictures, monkeypatch):
    datasets = pytest.importorskip("datasets")
    image_class = pytest.importorskip("PIL.Image")

    def table(name, split):
        assert name == example.HUB
        split = {"train": "train", "test": "t10k"}[split]
        images = [image_class.fromarray(image) for image in pictures[f"{split}-images-idx3-ubyte"]]
        columns = {"image": images, "label": pictures[f"{split}-labels-idx1-ubyte"]}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", table)
    data = example.load()
    assert np.array_equal(data.test_images, pictures["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.train_labels, pictures["train-labels-idx1-ubyte"])
