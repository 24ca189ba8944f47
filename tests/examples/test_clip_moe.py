"""The CLIP-MoE example: captions say what is on the canvases, and a smallest run on toy data."""

import importlib
import json
import struct
import sys

import numpy as np
import pytest
import torch
from common.examples import load_example
from transformers import AutoModel


@pytest.fixture(scope="module")
def example():
    yield load_example("clip_moe")
    for name in ("fashion_mnist", "fashion_captions", "clip_moe_report"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def captions(example):
    return importlib.import_module("fashion_captions")


@pytest.fixture
def toy(tmp_path):
    draw = np.random.default_rng(0)

    def idx(values):
        return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()

    for split, count in (("train", 240), ("t10k", 80)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path


def squares(count=200):
    """Squares on black: the sizes and shades are known."""
    draw, images = np.random.default_rng(1), np.zeros((count, 28, 28), np.uint8)
    side, shade = draw.integers(4, 28, count), draw.integers(10, 256, count)
    for image, width, value in zip(images, side, shade, strict=True):
        image[:width, :width] = value
    return images, np.arange(count) % 10, side, shade


def test_sizes_and_shades_are_those_of_the_pixels(captions):
    images, classes, side, shade = squares()
    pictures = captions.describe(images, classes)
    for one in range(10):
        mine = classes == one
        assert np.array_equal(pictures.sizes[mine], side[mine] ** 2 > np.median(side[mine] ** 2))
        assert np.array_equal(pictures.shades[mine], shade[mine] > np.median(shade[mine]))


def test_captions_say_what_is_on_the_canvases(captions):
    pictures = captions.describe(*squares()[:2])
    canvases = captions.Canvases(pictures, 50, seed=0, full=True)
    assert len(set(canvases.captions)) == len(canvases) == 50
    drawn = canvases.draw(np.arange(50))
    for row, caption in enumerate(canvases.captions):
        for one, part in enumerate(caption.split(" and ")):
            picture = canvases.index[row, one]
            _, size, shade, name, down, across = part.split()
            assert captions.WORDS.index(name) == pictures.classes[picture]
            assert captions.SIZES.index(size) == pictures.sizes[picture]
            assert captions.SHADES.index(shade) == pictures.shades[picture]
            quarter = drawn[row, 28 * (down == "bottom") :, 28 * (across == "right") :][:28, :28]
            assert np.array_equal(quarter, pictures.images[picture])
    partial = captions.Canvases(pictures, 200, seed=0)
    assert {caption.count(" and ") for caption in partial.captions} == {0, 1}
    assert {len(part.split()) for caption in partial.captions for part in caption.split(" and ")} == {4, 5, 6}


def test_processor_and_collator_give_the_same(captions):
    from PIL import Image

    canvases = captions.Canvases(captions.describe(*squares()[:2]), 20, seed=0)
    batch = canvases.collate([{"row": row} for row in range(4)])
    images = [Image.fromarray(canvas) for canvas in canvases.draw(np.arange(4))]
    processed = captions.make_processor()(
        images=images, text=canvases.captions[:4], padding="max_length", return_tensors="pt"
    )
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(processed[name], batch[name])
    torch.testing.assert_close(processed["pixel_values"], batch["pixel_values"])


def test_questions_have_the_answers_of_the_pictures(captions):
    canvases = captions.Canvases(captions.describe(*squares()[:2]), 60, seed=0, full=True)
    for what, word in (("class", 3), ("size", 1), ("shade", 2)):
        seen = []
        for rows, candidates, labels in captions.questions(canvases, what):
            for row, label in zip(rows, labels, strict=True):
                first, answer = canvases.captions[row].split(" and ")[0].split(), candidates[label].split()
                assert first[word] in answer and first[4:] == answer[-2:]
            seen += list(rows)
        assert sorted(seen) == list(range(60))


def test_clusters_of_one_attribute_are_pure_in_it(example):
    truth = np.arange(90) % 3
    labels = torch.from_numpy(truth * 9 + 5)
    pure, shuffled = example.purity(labels, truth)
    assert pure == 1.0 and 1 / 3 <= shuffled < 0.6


@pytest.mark.slow
def test_arms_take_the_same_steps_and_are_kept(example, toy, tmp_path, capsys, monkeypatch):
    steps = []

    def counted(model, args, data):
        steps.append((args.trained, args.max_steps))
        return fit(model, args, data)

    fit = example.fit
    monkeypatch.setattr(example, "fit", counted)
    words = ["--preset", "tiny", "--data", str(toy), "--output", str(tmp_path / "out"), "--seeds", "0"]
    rows = example.main(words)
    assert [row["arm"] for row in rows] == ["base", *example.ARMS]
    whole = example.PRESETS["tiny"].steps
    assert steps[1:3] == [("all", whole), ("moe", whole)]
    assert steps[3:] == [("feed_forward", whole // 4)] * 3 + [("router", whole // 4)] * 2
    base, *_, moe = rows
    assert moe["pipeline_agrees"] == 1.0 and base["activated"] == base["parameters"] < moe["activated"]
    assert [stage["stage"] for stage in moe["stages"]] == [0, 1, 2, 3] and moe["stages"][1]["purity"]["places"]
    for what in example.TASKS:
        assert moe["stages"][0][what] == base["held_out"][what]
    assert AutoModel.from_pretrained(tmp_path / "out" / "seed-0" / "clip-moe").config.model_type == "moe_clip"
    first = (tmp_path / "out" / "results.md").read_text()
    assert first in capsys.readouterr().out and (tmp_path / "out" / "results.png").stat().st_size > 0
    steps.clear()
    assert example.main(words) == rows and not steps
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == rows
    with pytest.raises(SystemExit):
        example.main([*words, "--learning-rate", "0.1"])
    assert "holds runs with other settings" in capsys.readouterr().err
