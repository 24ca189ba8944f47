"""Rows for TRL: conversations of several questions about one mosaic, and pairs of a right and a wrong answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from mosaics import Mosaic, caption, picture
from questions import KINDS, Question, ask, wrong_answer


__all__ = ["CAPTION", "CHAT_TEMPLATE", "conversations", "held_out_questions", "preferences", "prompt"]

#: What is asked for where a caption is the answer.
CAPTION = "What is in the picture?"
#: Short turns, no system prompt; labels are between the generation marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|im_start|>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '\\n' }}{% else %}{% generation %}"
    "{% for part in message['content'] %}{{ ' ' + part['text'] }}{% endfor %}<|im_end|>{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


def prompt(text: str) -> str:
    """What [`CHAT_TEMPLATE`] makes of a first question."""
    return f"<|im_start|><image>{text}\n"


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversations(
    mosaics: Sequence[Mosaic], images: np.ndarray, turns: int, seed: int, captions: bool = False
) -> Dataset:
    """One conversation about each mosaic.

    Args:
        mosaics (`Sequence[Mosaic]`), images (`np.ndarray`): What they are about.
        turns (`int`): Questions in each; all kinds alike, in random order.
        seed (`int`): Of the questions.
        captions (`bool`, defaults to `False`): One request for a caption instead.

    Returns:
        `Dataset`: `images` and `messages`.
    """
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for mosaic in mosaics:
        if captions:
            messages = [_user(CAPTION), _assistant(caption(mosaic))]
        else:
            kinds = random.permutation([KINDS[turn % len(KINDS)] for turn in range(turns)])
            asked = [ask(mosaic, str(kind), random) for kind in kinds]
            messages = [say for q in asked for say in (_user(q.text), _assistant(q.answer))]
        rows.append({"images": [picture(mosaic, images)], "messages": messages})
    return Dataset.from_list(rows)


def preferences(mosaics: Sequence[Mosaic], images: np.ndarray, seed: int) -> Dataset:
    """One question about each mosaic with a right and a wrong answer, as many of each kind.

    Of "where", "how many" and "is there" every other one is about an absent object, and its wrong answer sees what is
    not there. The others are wrong about what is, or deny it: a model would learn to deny everything if denials were
    right more often than not.

    Returns:
        `Dataset`: `images`, `prompt`, `chosen` and `rejected`.
    """
    random = np.random.default_rng(seed)
    rows = []
    for number, mosaic in enumerate(mosaics):
        kind = KINDS[number % len(KINDS)]
        about_absent = kind != "what" and number // len(KINDS) % 2 == 0
        question = ask(mosaic, kind, random)
        for _ in range(100):  # no class may be there just once
            if question.absent == about_absent:
                break
            question = ask(mosaic, kind, random)
        rows.append(
            {
                "images": [picture(mosaic, images)],
                "prompt": [_user(question.text)],
                "chosen": [_assistant(question.answer)],
                "rejected": [_assistant(wrong_answer(question, random))],
            }
        )
    return Dataset.from_list(rows)


def held_out_questions(
    known: Sequence[Mosaic], unseen: Sequence[Mosaic], seed: int
) -> dict[str, list[tuple[Mosaic, Question]]]:
    """Questions in three groups, one about each mosaic, as many of each kind.

    Args:
        known (`Sequence[Mosaic]`): Mosaics of held-out pictures, as training mosaics are.
        unseen (`Sequence[Mosaic]`): Such that have a class where it never is in training.
        seed (`int`): Of the questions.

    Returns:
        `dict`: `"new pictures"`, the words known; `"new words"`; `"new places"`, asking for the class at that place.
    """
    random = np.random.default_rng(seed)
    groups: dict[str, list[tuple[Mosaic, Question]]] = {}
    for name, mosaics in (("new pictures", known), ("new words", known), ("new places", unseen)):
        groups[name] = []
        for number, mosaic in enumerate(mosaics):
            kind = KINDS[number % len(KINDS)]
            question = ask(mosaic, kind, random, held_out=name == "new words")
            for _ in range(100):  # "where" may have no such question about this mosaic
                if name != "new places" or question.unseen:
                    break
                question = ask(mosaic, kind, random)
            else:
                continue
            groups[name].append((mosaic, question))
    return groups
