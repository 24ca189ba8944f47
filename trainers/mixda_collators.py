"""Batches of domain knowledge: running text, and sentences with the fact left out."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchEncoding, DataCollatorForLanguageModeling


__all__ = ["MixdaPromptCollator", "MixdaTextCollator"]

OBJECTIVES = ("masked", "causal")
# Of the chosen tokens (MixDA): replaced by the mask token, replaced by a random one; the other 10 % are kept.
MASKED, RANDOM = 0.85, 0.05
IGNORED = -100


class MixdaTextCollator:
    """Makes batches for language modelling of rows `{"text": ...}`, or of tokenised rows.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a padding token.
        objective (`str`, *optional*, defaults to `"masked"`): `"masked"` hides 15 % of the tokens (85 % of them by the
            mask token, 5 % by a random token, 10 % stay), `"causal"` predicts each next token, `None` gives no labels.
        max_length (`int`, *optional*): Longer texts are cut.
        mlm_probability (`float`, defaults to 0.15): Share of the tokens that are to be predicted.

    Raises:
        ValueError: `objective` is unknown, or the tokenizer lacks a padding or mask token.

    Example:

    ```python
    >>> collator = MixdaTextCollator(tokenizer, "masked", max_length=128)
    >>> batch = collator([{"text": "Aspirin inhibits cyclooxygenase."}])
    ```
    """

    def __init__(
        self, tokenizer: Any, objective: str | None = "masked", max_length: int | None = None,
        mlm_probability: float = 0.15,
    ):  # fmt: skip
        _check(tokenizer, objective, (*OBJECTIVES, None))
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.objective = objective
        self._collate: Any = None
        if objective == "masked":
            self._collate = DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=mlm_probability, mask_replace_prob=MASKED, random_replace_prob=RANDOM
            )
        elif objective == "causal":
            self._collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch.

        Args:
            rows (`Sequence[dict]`): With `text`, or with `input_ids`; other columns are left out.

        Returns:
            `dict[str, torch.Tensor]`: Model inputs and, unless the objective is `None`, `labels`.
        """
        encoded = [self._encode(row) for row in rows]
        if self._collate is not None:
            return dict(self._collate(encoded))
        return dict(self.tokenizer.pad(encoded, return_tensors="pt"))

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        names = {*self.tokenizer.model_input_names}
        if self.objective == "masked":
            names.add("special_tokens_mask")
        if "input_ids" not in row:
            if "text" not in row:
                raise ValueError(f"Rows need `text` or `input_ids`, got the columns {sorted(row)}.")
            cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
            row = self.tokenizer(row["text"], return_special_tokens_mask=self.objective == "masked", **cut)
        return {name: value for name, value in row.items() if name in names}


class MixdaPromptCollator:
    """Makes batches of facts: rows `{"prompt": "The capital of France is {}.", "targets": ["Paris"]}`.

    Each `{}` is filled with a target. For a masked language model the target's tokens are hidden and predicted; for a
    causal one they are shown, and the loss is that of predicting them.

    With as many targets as places, the places are filled in order; with one place and several targets, they are
    alternatives, one of which is drawn for each batch.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one, with a padding token.
        objective (`str`, defaults to `"masked"`): Or `"causal"`.
        max_length (`int`, *optional*): Longer texts are cut.

    Raises:
        ValueError: `objective` is unknown, or the tokenizer lacks something; a row has no `{}`, a number of targets
            that does not fit, or targets that `max_length` cuts off.

    Example:

    ```python
    >>> collator = MixdaPromptCollator(tokenizer)
    >>> batch = collator([{"prompt": "{} is the capital of {}.", "targets": ["Paris", "France"]}])
    ```
    """

    def __init__(self, tokenizer: Any, objective: str = "masked", max_length: int | None = None):
        _check(tokenizer, objective, OBJECTIVES)
        if not tokenizer.is_fast:
            raise ValueError(
                f"`tokenizer` must be a fast one, got {type(tokenizer).__name__}: where a target's tokens are is "
                "known to those only."
            )
        self.tokenizer = tokenizer
        self.objective = objective
        self.max_length = max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch.

        Args:
            rows (`Sequence[dict]`): With `prompt` and `targets`.

        Returns:
            `dict[str, torch.Tensor]`: Model inputs and `labels`, -100 outside the targets.
        """
        encoded, labels = zip(*(self._encode(row) for row in rows), strict=True)
        batch = dict(self.tokenizer.pad(list(encoded), return_tensors="pt"))
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for row, values in zip(batch["labels"], labels, strict=True):
            start = width - len(values) if self.tokenizer.padding_side == "left" else 0
            row[start : start + len(values)] = torch.tensor(values)
        return batch

    def _encode(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        text, spans = fill(row["prompt"], row["targets"])
        cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        encoding: BatchEncoding = self.tokenizer(text, return_offsets_mapping=True, **cut)
        offsets = encoding.pop("offset_mapping")
        inside = [any(a < end and b > start for start, end in spans) for a, b in offsets]
        if not any(inside):
            raise ValueError(
                f"`max_length={self.max_length}` leaves nothing of the targets {row['targets']!r} of the prompt "
                f"{row['prompt']!r}. Raise it."
            )
        ids: Any = encoding["input_ids"]
        labels = [token if hit else IGNORED for token, hit in zip(ids, inside, strict=True)]
        if self.objective == "masked":
            mask = self.tokenizer.mask_token_id
            encoding["input_ids"] = [mask if hit else token for token, hit in zip(ids, inside, strict=True)]
        return dict(encoding), labels


def fill(prompt: str, targets: str | Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The sentence and where its targets are.

    Args:
        prompt (`str`): With one `{}` per target.
        targets (`str` or `Sequence[str]`): See [`MixdaPromptCollator`].

    Returns:
        `tuple[str, list[tuple[int, int]]]`: The text, and start and end of each target in it.

    Raises:
        ValueError: The numbers of places and targets do not fit.
    """
    parts = prompt.split("{}")
    chosen = [targets] if isinstance(targets, str) else list(targets)
    if len(parts) == 2 and len(chosen) > 1:
        chosen = [chosen[int(torch.randint(len(chosen), ()))]]
    if len(parts) != len(chosen) + 1 or not all(chosen):
        raise ValueError(
            f"`prompt` must have one '{{}}' per target, or one for several alternatives; {prompt!r} has "
            f"{len(parts) - 1} for {targets!r}."
        )
    text, spans = parts[0], []
    for target, part in zip(chosen, parts[1:], strict=True):
        spans.append((len(text), len(text) + len(target)))
        text += target + part
    return text, spans


def _check(tokenizer: Any, objective: str | None, allowed: Sequence[str | None]) -> None:
    if objective not in allowed:
        raise ValueError(f"`objective` must be one of {list(allowed)}, got {objective!r}.")
    if tokenizer.pad_token_id is None:
        raise ValueError("`tokenizer` has no padding token. Set one: `tokenizer.pad_token = tokenizer.eos_token`.")
    if objective == "masked" and tokenizer.mask_token_id is None:
        raise ValueError("`tokenizer` has no mask token. Use `objective='causal'` for a causal language model.")
