"""Mosaics, the questions about them, and how answers are counted."""

from collections import Counter

import numpy as np
import pytest


LABELS = np.arange(200) % 10


def test_training_never_shows_what_is_kept_for_new_places(example):
    mosaics = example["mosaics"]
    pairs = {
        (label, place)
        for mosaic in mosaics.draw_mosaics(LABELS, 800, 0)
        for place, label in enumerate(mosaic.labels)
        if label is not None
    }
    assert len(pairs) == 36 and not pairs & mosaics.NEVER_TOGETHER
    assert all(mosaics.has_unseen(m) for m in mosaics.draw_mosaics(LABELS, 50, 0, unseen=True))


def test_a_mosaic_draws_its_pictures_where_its_labels_are(example):
    mosaics = example["mosaics"]
    images = np.arange(1, 5, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
    mosaic = mosaics.Mosaic((4, None, 8, 4), (2, 0, 1, 3))
    pixels = np.asarray(mosaics.picture(mosaic, images))
    assert pixels.shape == (56, 56, 3)
    assert [pixels[y, x, 0] for y in (5, 50) for x in (5, 50)] == [3, 0, 2, 4]
    text = "top left coat, top right nothing, bottom left bag, bottom right coat"
    assert mosaics.caption(mosaic) == text
    assert example["tower"].encode([mosaic]).shape == (1, 13)


def test_questions_have_the_answers_the_mosaic_gives(example):
    mosaics, questions = example["mosaics"], example["questions"]
    random = np.random.default_rng(0)
    absent = Counter()
    for mosaic in mosaics.draw_mosaics(LABELS, 300, 1):
        words = [None if label is None else mosaics.WORDS[label] for label in mosaic.labels]
        for kind in questions.KINDS:
            asked = questions.ask(mosaic, kind, random)
            if kind == "what":
                place = next(i for i, name in enumerate(mosaics.PLACES) if name in asked.text)
                assert asked.answer == (words[place] or "nothing") and not asked.absent
                continue
            (word,) = (w for w in mosaics.WORDS if f" {w}" in asked.text)
            assert asked.absent == (word not in words)
            absent[kind, asked.absent] += 1
            if kind == "how many":
                assert asked.answer == str(words.count(word))
            elif kind == "is there":
                assert asked.answer == ("yes" if word in words else "no")
            elif word in words:
                assert words.count(word) == 1 and asked.answer == mosaics.PLACES[words.index(word)]
            else:
                assert asked.answer == "nowhere"
            wrong = questions.wrong_answer(asked, random)
            assert wrong != asked.answer and (not asked.absent or wrong not in ("nowhere", "0", "no"))
    assert absent["is there", True] == pytest.approx(150, abs=35)


def test_held_out_words_are_not_those_of_training(example):
    mosaics, questions, data = (example[name] for name in ("mosaics", "questions", "data"))
    known = mosaics.draw_mosaics(LABELS, 40, 2)
    groups = data.held_out_questions(known, mosaics.draw_mosaics(LABELS, 40, 3, unseen=True), 4)
    images = np.zeros((200, 28, 28), np.uint8)
    trained = {m["content"] for row in data.conversations(known, images, 8, 0)["messages"] for m in row}
    fixed = {text.split("{}")[0] for texts in questions.PHRASINGS.values() for text in texts[-1:]}
    assert not any(text.startswith(tuple(fixed)) for text in trained)
    assert all(q.text.startswith(tuple(fixed)) for _, q in groups["new words"])
    assert len(groups["new pictures"]) == 40 and {q.kind for _, q in groups["new pictures"]} == set(questions.KINDS)
    assert groups["new places"] and all(q.unseen for _, q in groups["new places"])
    assert not any(q.unseen for _, q in groups["new pictures"])


def test_denials_are_right_as_often_as_they_are_wrong(example):
    mosaics, data = example["mosaics"], example["data"]
    rows = data.preferences(mosaics.draw_mosaics(LABELS, 80, 2), np.zeros((200, 28, 28), np.uint8), 0)
    right = [row[0]["content"] for row in rows["chosen"]]
    assert right.count("no") == right.count("yes") == 10
    assert right.count("nowhere") == pytest.approx(10, abs=2) and right.count("0") == 10
    assert all(a[0]["content"] != b[0]["content"] for a, b in zip(rows["chosen"], rows["rejected"], strict=True))


def test_answers_are_counted(example):
    ask = example["questions"].Question
    asked = [
        ask("what", "", "bag"), ask("where", "", "top left"), ask("where", "", "nowhere", absent=True),
        ask("is there", "", "no", absent=True), ask("is there", "", "yes"), ask("how many", "", "0", absent=True),
    ]  # fmt: skip
    said = ["bag", "nowhere", "top left", "no", "yes", "1"]
    figures = example["scoring"].score([(None, q) for q in asked], said)
    assert figures["accuracy"] == 3 / 6 and figures["hallucination"] == 1 / 2 and figures["denial"] == 1 / 2
    assert figures["what"] == 1 and figures["where"] == 0 and figures["is there"] == 1 and figures["how many"] == 0
    assert example["scoring"].majority([(None, q) for q in asked], [(None, asked[0])]) == ["bag"]
