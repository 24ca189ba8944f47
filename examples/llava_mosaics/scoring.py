"""Asks a model, and counts what it answers right and what it makes up."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from data import prompt
from mosaics import Mosaic, picture
from questions import KINDS, NOTHING, NOWHERE, Question


__all__ = ["answers", "majority", "score"]

Asked = Sequence[tuple[Mosaic, Question]]
#: Answers that see nothing.
_DENIALS = {"where": NOWHERE, "how many": "0", "is there": "no", "what": NOTHING}


@torch.no_grad()
def answers(model: Any, processor: Any, asked: Asked, images: np.ndarray, batch_size: int = 50) -> list[str]:
    """What the model says, most likely token by most likely token.

    Args:
        model: A LLaVA.
        processor: Its processor.
        asked (`Sequence[tuple[Mosaic, Question]]`): What to ask about which mosaic.
        images (`np.ndarray`): Pictures the mosaics are made of.
        batch_size (`int`, defaults to 50): Questions at a time.
    """
    model.eval()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][1].text))  # little padding
    said = [""] * len(asked)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = processor(
            images=[picture(asked[i][0], images) for i in rows],
            text=[prompt(asked[i][1].text) for i in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            ids = model.generate(
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(rows, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            said[i] = text.strip()
    return said


def score(asked: Asked, said: Sequence[str]) -> dict[str, float | None]:
    """Shares of right answers, and of two ways to be wrong.

    Returns:
        `dict`: `accuracy`, and of each kind of question; `hallucination`: of "where" and "is there" questions about
        absent objects, those answered as if it was there; `denial`: of those about present ones, those answered
        "nowhere" or "no"; `None` where nothing was asked.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    seen: dict[bool, list[bool]] = {True: [], False: []}
    for (_, question), answer in zip(asked, said, strict=True):
        right[question.kind].append(answer == question.answer)
        if question.kind in ("where", "is there"):
            seen[question.absent].append(answer != _DENIALS[question.kind])
    figures = {"accuracy": _mean([value for values in right.values() for value in values])}
    figures |= {kind: _mean(values) for kind, values in right.items()}
    denied = [not value for value in seen[False]]
    return {**figures, "hallucination": _mean(seen[True]), "denial": _mean(denied)}


def majority(train: Asked, asked: Asked) -> list[str]:
    """The most frequent answer of each kind in training, as if a model had learned nothing else."""
    best = {
        kind: Counter(question.answer for _, question in train if question.kind == kind).most_common(1)[0][0]
        for kind in KINDS
    }
    return [best[question.kind] for _, question in asked]


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if values else None
