"""The MoSA example: its tasks, and a smallest run on toy data."""

import gzip
import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    loaded = {}
    for name in ("fashion_mnist", "mosa"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    yield loaded["mosa"]
    for name in loaded:
        del sys.modules[name]


@pytest.fixture
def toy(tmp_path):
    draw = np.random.default_rng(0)

    def idx(values):
        return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()

    for split, count in (("train", 128), ("t10k", 120)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    table = np.concatenate([draw.integers(0, 256, (120, 784)), np.arange(120)[:, None] % 10], 1)
    np.savetxt(tmp_path / "mnist.csv.gz", table, delimiter=",", fmt="%d")
    return tmp_path


@pytest.mark.slow
def test_smallest_run_writes_table_plot_and_record(example, toy, tmp_path, capsys):
    folder = tmp_path / "out"
    results = example.main(
        ["--preset", "smallest", "--tasks", "digits", "rotation", "--seeds", "0", "--data", str(toy),
         "--mnist", str(toy / "mnist.csv.gz"),
         "--output", str(folder)]
    )  # fmt: skip
    assert len(results) == 2 * len(example.METHODS)
    record = json.loads((folder / "results.json").read_text())
    assert record["results"] == results and record["settings"]["steps"] == 2
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "results.md").read_text()
    assert all(f"| {title} |" in table for title in example.METHODS.values()) and table in capsys.readouterr().out
    sizes = {row["method"]: row["parameters"] for row in results}
    assert sizes["head"] == 0 and sizes["standard"] == sizes["two passes"] == sizes["mosa"]
    assert sizes["standard"] <= sizes["lora"] < 1.3 * sizes["standard"]


def test_the_few_are_not_among_the_tested_and_depend_on_the_seed(example):
    settings = example.PRESETS["short"]
    images = np.arange(200, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
    labels = np.arange(200) % 5
    one, other = (example.few_shots(images, labels, settings, np.random.default_rng(seed)) for seed in (0, 1))
    assert one.classes == 5 and len(one.train) == 5 * settings.shots
    assert np.bincount(one.train_labels).tolist() == [settings.shots] * 5
    train, test = set(one.train[:, 0, 0]), set(one.test[:, 0, 0])
    assert not train & test
    assert train != set(other.train[:, 0, 0]) and np.array_equal(one.test, other.test)


def test_labels_of_the_made_tasks_are_right(example):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    turned, turns = example.rotated(images, np.random.default_rng(1))
    assert all(np.array_equal(np.rot90(t, -k), i) for t, k, i in zip(turned, turns, images, strict=True))
    made, labels = example.mosaics(images, np.arange(12), np.random.default_rng(1))
    assert made.shape == images.shape and np.array_equal(labels, np.arange(12))
    small = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)
    assert np.array_equal(made[:, :14, :14], small) and not np.array_equal(made[:, 14:, 14:], small)


def test_a_wrong_digit_file_is_refused(example, tmp_path):
    np.savetxt(tmp_path / "x.csv", np.zeros((3, 4)), delimiter=",")
    with pytest.raises(ValueError, match="785 numbers on each line"):
        example.mnist_digits(tmp_path / "x.csv")
