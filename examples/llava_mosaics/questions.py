"""Questions about mosaics: what, where, how many, is there; half of the last about objects that are not there."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from mosaics import NEVER_TOGETHER, PLACES, WORDS, Mosaic


__all__ = ["KINDS", "PHRASINGS", "Question", "ask", "wrong_answer"]

KINDS = ("what", "where", "how many", "is there")
#: Ways to ask, by kind; the last of each is kept for the held-out questions.
PHRASINGS = {
    "what": ("What is {}?", "What is in the {} cell?", "Which object is {}?"),
    "where": ("Where is the {}?", "In which cell is the {}?", "Which cell has the {}?"),
    "how many": ("How many times is there a {}?", "How many of the cells show a {}?", "Count: {}. How many?"),
    "is there": ("Is there a {}?", "Is a {} in the picture?", "Can you see a {}?"),
}
NOTHING, NOWHERE = "nothing", "nowhere"


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Args:
        kind (`str`): One of [`KINDS`].
        text, answer (`str`): What is asked and what is right.
        absent (`bool`): It is about an object that the mosaic has not.
        unseen (`bool`): Its answer rests on a class at a place where it never is in training.
    """

    kind: str
    text: str
    answer: str
    absent: bool = False
    unseen: bool = False


def ask(mosaic: Mosaic, kind: str, random: np.random.Generator, held_out: bool = False) -> Question:
    """Asks one question.

    Args:
        mosaic ([`Mosaic`]): What it is about.
        kind (`str`): One of [`KINDS`]. "What" is about each place alike; "where" about an absent object one time in
            four; "how many" and "is there" every other time.
        random (`np.random.Generator`): Draws the object and the words.
        held_out (`bool`, defaults to `False`): In words that training never has.

    Returns:
        [`Question`]
    """
    texts = PHRASINGS[kind]
    text = texts[-1] if held_out else texts[random.integers(len(texts) - 1)]
    if kind == "what":
        place = int(random.integers(4))
        label = mosaic.labels[place]
        answer = NOTHING if label is None else WORDS[label]
        return Question(kind, text.format(PLACES[place]), answer, unseen=(label, place) in NEVER_TOGETHER)
    counts = Counter(label for label in mosaic.labels if label is not None)
    absent = [label for label in range(len(WORDS)) if label not in counts]
    # "where" has one answer only for what is there once
    present = [label for label, count in counts.items() if kind != "where" or count == 1]
    is_absent = not present or random.random() < (0.25 if kind == "where" else 0.5)
    chosen = absent if is_absent else present
    label = chosen[random.integers(len(chosen))]
    places = [place for place, other in enumerate(mosaic.labels) if other == label]
    if kind == "where":
        answer = NOWHERE if is_absent else PLACES[places[0]]
    elif kind == "how many":
        answer = str(len(places))
    else:
        answer = "no" if is_absent else "yes"
    unseen = any((label, place) in NEVER_TOGETHER for place in places)
    return Question(kind, text.format(WORDS[label]), answer, is_absent, unseen)


def wrong_answer(question: Question, random: np.random.Generator) -> str:
    """What a model would answer that sees what is not there, or not what is: another answer of the same kind.

    About an absent object it claims a place, a number above 0, or "yes".
    """
    choices: tuple[str, ...]
    if question.kind == "what":
        choices = (*WORDS, NOTHING)
    elif question.kind == "where":
        choices = PLACES if question.absent else (*PLACES, NOWHERE)
    elif question.kind == "how many":
        choices = ("1", "2") if question.absent else ("0", "1", "2", "3")
    else:
        choices = ("yes", "no")
    choices = tuple(choice for choice in choices if choice != question.answer)
    return choices[random.integers(len(choices))]
