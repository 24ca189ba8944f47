"""Batches of mixed modalities for Uni-MoE, with labels on the answers alone."""

from collections.abc import Sequence
from typing import Any

import torch

from .uni_moe_media import MEDIA, decoded, media_of


__all__ = ["UniMoeCollator"]


class UniMoeCollator:
    """Makes batches from rows with `prompt`, `completion` and any of `images`, `videos`, `speech`, `audio`.

    A row may have any number of media, one placeholder each in its prompt; rows of different modalities may share a
    batch. Labels are -100 on prompts, media and padding: the loss is that of the answer
    ([Uni-MoE](https://huggingface.co/papers/2405.11273)). Use `remove_unused_columns=False` with a Trainer.

    Args:
        processor ([`UniMoeProcessor`]): Of the model.

    Returns:
        `dict`: `input_ids`, `attention_mask` and `labels`, each `(B, S)`, and the media that there are.

    Raises:
        ValueError: a row without `prompt` or `completion`, or with another number of media than of placeholders; see
            also [`UniMoeProcessor`].

    Example:

    ```python
    rows = [{"prompt": "<speech>What was said? ", "completion": "Front left.", "speech": [waveform]},
            {"prompt": "What is two and two? ", "completion": "Four."}]
    MoeTrainer(model, args, train_dataset=rows, data_collator=UniMoeCollator(processor)).train()
    ```
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in examples:
            missing = [name for name in ("prompt", "completion") if not isinstance(row.get(name), str)]
            if missing:
                raise ValueError(f"Every row needs a string `{missing[0]}`, got a row with {sorted(row)}.")
            self._check_media(row)
        media: dict[str, Any] = {
            name: [decoded(item, self._sampling_rate(name)) for row in examples for item in media_of(row, name)]
            for name in MEDIA
        }
        tokenizer = self.processor.tokenizer
        batch = self.processor(
            text=[row["prompt"] for row in examples], **{name: items or None for name, items in media.items()}
        )
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answers = tokenizer([row["completion"] for row in examples], add_special_tokens=False)["input_ids"]
        answers = [[*ids, *end] for ids in answers]
        rows = [prompt + answer for prompt, answer in zip(batch.pop("input_ids"), answers, strict=True)]
        padded = tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")
        labels = torch.full_like(padded["input_ids"], -100)
        for index, (ids, answer) in enumerate(zip(rows, answers, strict=True)):
            end_of_row = labels.shape[1] if tokenizer.padding_side == "left" else len(ids)
            labels[index, end_of_row - len(answer) : end_of_row] = torch.tensor(answer)
        kept = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "labels": labels,
            **kept,
        }

    def _sampling_rate(self, column: str) -> int | None:
        return getattr(getattr(self.processor, f"{column}_feature_extractor", None), "sampling_rate", None)

    def _check_media(self, row: dict[str, Any]) -> None:
        # The processor counts over a whole batch, where one row's missing picture would be taken from the next row.
        for column, modality in MEDIA.items():
            token = getattr(self.processor, f"{modality}_token", None)
            found = row["prompt"].count(token) if token is not None else 0
            given = len(media_of(row, column))
            if found != given:
                raise ValueError(
                    f"`{column}` has {given} items in the row with the prompt {row['prompt'][:80]!r}, which has "
                    f"{found} placeholders {token!r}: write one placeholder for each."
                )
