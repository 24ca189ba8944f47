"""The Uni-MoE example: its questions, its sounds, and a smallest run on toy data."""

import json
import wave
from itertools import pairwise

import numpy as np
import pytest
from common.examples import load_example
from common.toy_pictures import write_toy_pictures


@pytest.fixture(scope="module")
def example():
    return load_example("uni_moe")


@pytest.fixture
def toy(tmp_path):
    return write_toy_pictures(tmp_path)


def questions(example, kind, number=20):
    """Rows about pictures whose pixels all have the value of their class."""
    images = np.arange(10, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    clips = [np.full(1600, float(channel)) for channel in range(len(example.CHANNELS))]
    return example.make_rows(kind, number, images, np.arange(10), clips, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["picture", "mosaic", "video", "speech", "spoken"])
def test_questions_have_the_answers_that_their_media_give(kind, example):
    for row in questions(example, kind):
        assert row["prompt"].count("<image>") == len(row.get("images", ()))
        assert row["prompt"].count("<speech>") == len(row.get("speech", ()))
        names = [example.CLASSES[picture[0, 0, 0]] for picture in row.get("images", ())]
        if kind == "picture":
            assert row["completion"] == names[0]
        elif kind == "video":
            (frames,) = row["videos"]
            assert len(frames) == 4 and row["completion"] == example.CLASSES[frames[0].max()]
        elif kind == "mosaic":
            place = row["prompt"].split("what is ")[1].removesuffix(" ?")
            assert row["completion"] == names[example.PLACES.index(place)]
        else:
            (sound,) = row["speech"]
            # The clip of channel c is c everywhere, times a loudness from 0.4 to 1: it can be told from silence.
            said = example.CHANNELS.index(row["completion"]) if kind == "speech" else None
            assert said is None or (np.abs(sound).max() > 0.3) == (said > 0)
            assert kind == "speech" or row["completion"] in names


def test_a_moving_picture_moves(example):
    picture = np.zeros((28, 28), np.uint8)
    picture[10:14, 10:14] = 255
    frames = example.moving(picture, np.random.default_rng(0))
    places = [tuple(np.argwhere(frame[..., 0])[0]) for frame in frames]
    steps = {(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)}
    assert len(steps) == 1 and sorted(map(abs, steps.pop())) == [0, 2]


def test_clips_come_from_a_folder_or_are_tones(example, tmp_path):
    tones = example.load_clips(None)
    assert len(tones) == 8 and len({clip.tobytes() for clip in tones}) == 8
    with pytest.raises(FileNotFoundError, match=r"Front_Center.wav is missing: `--sounds` takes the folder"):
        example.load_clips(str(tmp_path))
    for name, value in zip(example.CHANNELS, range(8), strict=True):
        with wave.open(str(tmp_path / f"{name.title().replace(' ', '_')}.wav"), "wb") as file:
            file.setparams((1, 2, 48000, 0, "NONE", None))
            file.writeframes(np.full(4800, 100 * value, np.int16).tobytes())
    clips = example.load_clips(str(tmp_path))
    assert [len(clip) for clip in clips] == [1600] * 8
    np.testing.assert_allclose([clip[0] * 32768 for clip in clips], np.arange(8) * 100, atol=1e-3)


@pytest.mark.slow
def test_all_methods_are_trained_and_compared(example, toy, tmp_path, capsys):
    output = tmp_path / "out"
    result = example.main(["--data", str(toy), "--output", str(output), "--preset", "tiny"])
    rows = result["rows"]
    assert [row["method"] for row in rows] == list(example.METHODS)
    assert all(0 <= row[kind] <= 1 for row in rows for kind in example.KINDS)
    uni, copies, dense = rows
    assert uni["active"] == copies["active"] < uni["parameters"] and dense["active"] == dense["parameters"]
    assert "routing" not in dense
    shares = [layer for layers in uni["routing"].values() for layer in layers]
    assert len(shares) == 8 and all(sum(layer) == pytest.approx(1) and len(layer) == 3 for layer in shares)
    stored = json.loads((output / "results.json").read_text())
    assert stored["rows"] == rows and str(toy) not in json.dumps(stored)  # no folder of this machine
    table = (output / "results.md").read_text()
    assert table in capsys.readouterr().out and all(f"| {name} |" in table for name in example.METHODS)
    assert (output / "results.png").stat().st_size > 0
