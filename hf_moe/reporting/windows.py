"""Texts -> token windows -> padded batches, one at a time.

Shapes: B batch, S sequence.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch


__all__ = ["check_tokenizer", "token_batches", "token_windows"]

# Batches read ahead.
POOL = 16


def check_tokenizer(tokenizer: Any, num_embeddings: int) -> None:
    """Refuses a tokenizer that can produce ids the model has no embedding for.

    Args:
        tokenizer: A transformers tokenizer.
        num_embeddings (`int`): Rows of the model's input embedding.

    Raises:
        ValueError: the vocabulary is larger than the embedding.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > num_embeddings:
        raise ValueError(
            f"`tokenizer` has {size} ids but the model embeds {num_embeddings}: they do not belong together. Use the "
            "tokenizer saved with the model, or resize the embedding with `model.resize_token_embeddings`."
        )


def token_windows(
    tokenizer: Any, texts: Iterable[str], max_length: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Token ids of each text, long texts cut into consecutive windows.

    Args:
        tokenizer: A transformers tokenizer.
        texts (`Iterable[str]`): Read one by one.
        max_length (`int`): Tokens of a window at most.
        max_tokens (`int`, *optional*): Stop after this many tokens, exactly.

    Yields:
        `list[int]`: Never empty.
    """
    left = max_tokens if max_tokens is not None else float("inf")
    for text in texts:
        if left <= 0:
            return
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), max_length):
            window = ids[start : start + max_length]
            window = window[: int(min(left, len(window)))]
            left -= len(window)
            if window:
                yield window


def token_batches(
    windows: Iterable[list[int]], batch_size: int, pad_token_id: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded batches. Windows of like length go together, from a pool of a few batches: the order of the windows
    does not matter to statistics, and padding costs as much as text.

    Args:
        windows (`Iterable[list[int]]`): Token ids.
        batch_size (`int`): B at most.
        pad_token_id (`int`, *optional*): Filler; 0 where the tokenizer has none, since the mask hides it.

    Yields:
        `input_ids` and `attention_mask`, both `(B, S)` int64.
    """
    windows = iter(windows)
    while pool := sorted(islice(windows, POOL * batch_size), key=len, reverse=True):
        yield from (_pad(pool[start : start + batch_size], pad_token_id) for start in range(0, len(pool), batch_size))


def _pad(rows: list[list[int]], pad_token_id: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` of one batch, `(B, S)` int64, padded on the right."""
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_token_id or 0, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
    return input_ids, attention_mask
