"""Rows of text as tokens, and pairs of a row to forget with a row to retain.

Shapes: B batch, S sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_moe.attribution import pad_token_rows


__all__ = ["PairCollator", "PairedRows", "TokenRows"]


class TokenRows(Dataset):
    """Rows with `input_ids` (and `labels`), made of text or messages where a dataset has no tokens yet.

    Args:
        data (`Sequence`): Rows with `input_ids`, `text`, or `messages`; the first column found is used.
        tokenizer (*optional*): For text and messages.
        max_length (`int`, defaults to 512): Longer rows are cut.
        name (`str`, defaults to `"dataset"`): The argument it came by, for messages.

    Raises:
        ValueError: there is no row, or text but no tokenizer.
        TypeError: rows have none of these columns.
    """

    def __init__(self, data: Any, tokenizer: Any = None, max_length: int = 512, name: str = "dataset"):
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise TypeError(f"`{name}` must have a length and rows by number, got {type(data).__name__}.")
        if len(data) == 0:
            raise ValueError(f"`{name}` is empty.")
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length
        first = data[0]
        columns = sorted(first) if isinstance(first, Mapping) else []
        self.column = next((c for c in ("input_ids", "text", "messages") if c in columns), None)
        if self.column is None:
            raise TypeError(
                f"Rows of `{name}` need a column `input_ids`, `text` or `messages`, got {columns or first!r}."
            )
        if self.column != "input_ids" and tokenizer is None:
            raise ValueError(
                f"`{name}` has {self.column!r} and no `input_ids`: pass a tokenizer as `processing_class`."
            )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.data[index]
        if self.column == "input_ids":
            columns = [c for c in ("input_ids", "attention_mask", "labels") if row.get(c) is not None]
            return {column: row[column][: self.max_length] for column in columns}
        if self.column == "messages":
            text = self.tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(row["text"])["input_ids"]
        return {"input_ids": ids[: self.max_length]}


class PairedRows(Dataset):
    """Every row to forget with a row to retain, drawn without repetition until all have been; the next epoch goes on
    where the last one ended.

    Args:
        forget (`TokenRows`): F rows.
        retain (`TokenRows`, *optional*): R rows.
        seed (`int`, defaults to 0): Seed of the order of the retain rows.
    """

    def __init__(self, forget: TokenRows, retain: TokenRows | None = None, seed: int = 0):
        self.forget, self.retain, self.epoch = forget, retain, 0
        generator = torch.Generator().manual_seed(seed)
        self.order = [] if retain is None else torch.randperm(len(retain), generator=generator).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        pair = {"forget": self.forget[index]}
        if self.retain is not None:
            pair["retain"] = self.retain[self.order[(self.epoch * len(self) + index) % len(self.order)]]
        return pair


class PairCollator:
    """Two padded batches, `{"forget": ..., "retain": ...}`: `input_ids`, `attention_mask`, `labels`, `(B, S)` each.

    Args:
        pad_token_id (`int`, defaults to 0): Fills `input_ids`.
    """

    def __init__(self, pad_token_id: int = 0):
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        """Pads each side by itself.

        Raises:
            ValueError: a side is nothing but padding.
        """
        batch = {}
        for side in pairs[0]:
            batch[side] = pad_token_rows([pair[side] for pair in pairs], self.pad_token_id)
            if not batch[side]["attention_mask"].any():
                raise ValueError(f"A {side} batch is nothing but padding. Leave out empty texts.")
        return batch
