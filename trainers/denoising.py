"""Denoising beside translation: the multitask objective of Z-code M3, through one sequence-to-sequence loss.

[Scalable and Efficient MoE Training for Multitask Multilingual Models](https://huggingface.co/papers/2109.10465):
translation on parallel text, and denoising auto-encoding on text of each language, source corrupted, target clean, the
target beginning with a tag of its language. Span lengths follow BART (1910.13461); corruption rate and sampling
temperature of Z-code are not established, the defaults here are ours.

Shapes: B rows, S source tokens, G target tokens, M masked spans of a row.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


__all__ = ["DenoisingCollator", "MaskedText", "fill_spans", "interleave_tasks", "mask_spans", "temperature_sampling"]


class MaskedText(NamedTuple):
    """A text with spans taken out.

    Args:
        source (`list[int]`): The text, a sentinel in place of each span.
        spans (`list[list[int]]`): What was there, in order; span i stands behind sentinel i.
    """

    source: list[int]
    spans: list[list[int]]


def mask_spans(
    ids: Sequence[int],
    sentinels: Sequence[int],
    mask_ratio: float = 0.35,
    mean_span: float = 3.5,
    generator: torch.Generator | None = None,
) -> MaskedText:
    """Takes spans of Poisson-distributed length out of a text, at uniformly random places, never two side by side.

    Args:
        ids (`Sequence[int]`): The text.
        sentinels (`Sequence[int]`): Ids that mark the places, in order. Where there are fewer of them than spans, or
            too little text to lie between, spans become longer instead.
        mask_ratio (`float`, defaults to 0.35): Share of the tokens to take, rounded to whole ones.
        mean_span (`float`, defaults to 3.5): Mean of the Poisson distribution; an empty span counts as one token.
        generator (`torch.Generator`, *optional*): CPU generator; torch's own by default.

    Returns:
        [`MaskedText`]

    Raises:
        ValueError: a number out of range, or no sentinel.

    Example:

    ```python
    >>> masked = mask_spans([5, 6, 7, 8, 9], sentinels=[90, 91])
    >>> fill_spans(masked, [90, 91])
    [5, 6, 7, 8, 9]
    ```
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"`mask_ratio` must be between 0 and 1, got {mask_ratio}.")
    if not mean_span > 0:
        raise ValueError(f"`mean_span` must be above 0, got {mean_span}.")
    if not sentinels:
        raise ValueError("`sentinels` is empty; masked spans need at least one id to stand for them.")
    masked = round(mask_ratio * len(ids))
    if masked == 0:
        return MaskedText(list(ids), [])
    kept = len(ids) - masked
    lengths = _span_lengths(masked, mean_span, min(len(sentinels), kept + 1), generator)
    # The tokens that stay lie before, between and behind the spans; between two there is at least one.
    free = kept - (len(lengths) - 1)
    bars = torch.randperm(free + len(lengths), generator=generator)[: len(lengths)].sort().values.tolist()
    before = [bar - previous - 1 for previous, bar in zip([-1, *bars], bars, strict=False)]
    source, spans, position = [], [], 0
    for i, (gap, length) in enumerate(zip(before, lengths, strict=True)):
        start = position + gap + (i > 0)
        source += [*ids[position:start], sentinels[i]]
        position = start + length
        spans.append(list(ids[start:position]))
    return MaskedText(source + list(ids[position:]), spans)


def _span_lengths(masked: int, mean_span: float, most: int, generator: torch.Generator | None) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) < masked:
        drawn = int(torch.poisson(torch.tensor(float(mean_span)), generator=generator))
        lengths.append(min(max(drawn, 1), masked - sum(lengths)))
    while len(lengths) > most:
        shortest = lengths.pop(lengths.index(min(lengths)))
        lengths[lengths.index(min(lengths))] += shortest
    return lengths


def fill_spans(masked: MaskedText, sentinels: Sequence[int]) -> list[int]:
    """The text again: every sentinel replaced by what it stands for.

    Args:
        masked ([`MaskedText`]): From [`mask_spans`].
        sentinels (`Sequence[int]`): The same as there.
    """
    place = {sentinel: span for sentinel, span in zip(sentinels, masked.spans, strict=False)}
    return [token for t in masked.source for token in place.get(t, [t])]


class DenoisingCollator:
    """Makes batches of rows of both tasks. A row with `labels` is a translation and is left as it is; one without is
    text of one language, which is corrupted anew each time it is seen.

    Rows have `input_ids`, `language` (of the target) and, for translations, `labels`, all without special tokens.

    Args:
        tokenizer: Gives padding, end of text and, by default, the sentinels `<extra_id_0>`, `<extra_id_1>`, ...
        language_tags (`Mapping[str, int]`, *optional*): Language to the id the target begins with. Generate with
            `forced_bos_token_id=tag`, as with NLLB.
        mask_ratio (`float`, defaults to 0.35): Share of the tokens that are masked.
        mean_span (`float`, defaults to 3.5): Mean length of a masked span.
        target (`str`, defaults to `"text"`): `"text"`, the whole clean text, or `"spans"`, each sentinel and what it
            stands for, as T5 was trained.
        sentinels (`Sequence[int]`, *optional*): Ids of the sentinels.
        max_length (`int`, *optional*): Sources and targets are cut to it.
        generator (`torch.Generator`, *optional*): Of the corruption; by default torch's own, which differs from worker
            to worker and is restored when a run is resumed.

    Raises:
        ValueError: the tokenizer has no padding or no sentinels, `target` is unknown; (when called) a language has no
            tag.

    Example:

    ```python
    >>> collator = DenoisingCollator(tokenizer, language_tags={"en": en, "de": de})
    >>> batch = collator([{"input_ids": text, "language": "de"}, {"input_ids": en, "labels": de, "language": "de"}])
    ```
    """

    def __init__(
        self,
        tokenizer: Any,
        language_tags: Mapping[str, int] | None = None,
        mask_ratio: float = 0.35,
        mean_span: float = 3.5,
        target: str = "text",
        sentinels: Sequence[int] | None = None,
        max_length: int | None = None,
        generator: torch.Generator | None = None,
    ):
        if target not in ("text", "spans"):
            raise ValueError(f"`target` must be 'text' or 'spans', got {target!r}.")
        if tokenizer.pad_token_id is None:
            raise ValueError("`tokenizer` has no padding token; set `tokenizer.pad_token`.")
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.sentinels = list(sentinels) if sentinels is not None else _sentinels(tokenizer)
        if not self.sentinels:
            raise ValueError(
                "`tokenizer` has no sentinels `<extra_id_0>`, ...: add them with `tokenizer.add_tokens` resize the "
                "model's embeddings, or pass `sentinels`."
            )
        self.language_tags = None if language_tags is None else dict(language_tags)
        self.mask_ratio = mask_ratio
        self.mean_span = mean_span
        self.target = target
        self.max_length = max_length
        self.generator = generator
        mask_spans([], self.sentinels, mask_ratio, mean_span)  # refuses numbers out of range

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask` `(B, S)`, `labels` `(B, G)`, padded with -100."""
        sources, targets = zip(*(self.row(feature) for feature in features), strict=True)
        return {
            "input_ids": _padded(sources, self.pad_token_id),
            "attention_mask": _padded([[1] * len(source) for source in sources], 0),
            "labels": _padded(targets, -100),
        }

    def row(self, feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Source and target of one row, special tokens included."""
        source, target = list(feature["input_ids"]), feature.get("labels")
        if target is None:
            source = source[: self._room(1)]
            masked = mask_spans(source, self.sentinels, self.mask_ratio, self.mean_span, self.generator)
            target = source if self.target == "text" else self._spans(masked)
            source = masked.source
        tag = self._tag(feature.get("language"))
        end = [] if self.eos_token_id is None else [self.eos_token_id]
        return source[: self._room(len(end))] + end, tag + list(target)[: self._room(len(tag + end))] + end

    def _spans(self, masked: MaskedText) -> list[int]:
        return [token for s, span in zip(self.sentinels, masked.spans, strict=False) for token in (s, *span)]

    def _tag(self, language: str | None) -> list[int]:
        if self.language_tags is None:
            return []
        if language not in self.language_tags:
            raise ValueError(
                f"a row is in the language {language!r}; `language_tags` has {sorted(self.language_tags)}."
            )
        return [self.language_tags[language]]

    def _room(self, used: int) -> int | None:
        return None if self.max_length is None else self.max_length - used


def _sentinels(tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    found = []
    while (token := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[token])
    return found


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def temperature_sampling(sizes: Sequence[float], temperature: float = 5.0) -> list[float]:
    """Probabilities of data sets of these sizes, p_l = n_l^(1/S) / sum of n^(1/S): small languages come up more often.

    Args:
        sizes (`Sequence[float]`): n_l, above 0.
        temperature (`float`, defaults to 5.0): S; 1 is in proportion to size, `math.inf` all alike.

    Returns:
        `list[float]`: They sum to 1.

    Raises:
        ValueError: no sizes, one that is not above 0, or S below 1.

    Example:

    ```python
    >>> temperature_sampling([9, 1], 2)
    [0.75, 0.25]
    ```
    """
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"`sizes` must hold at least one number, all above 0, got {list(sizes)}.")
    if not temperature >= 1:
        raise ValueError(f"`temperature` must be at least 1, got {temperature}.")
    largest = max(sizes)  # so that no power overflows
    weights = [(size / largest) ** (1 / temperature) for size in sizes]
    return [weight / sum(weights) for weight in weights]


def interleave_tasks(datasets: Mapping[str, Any], temperature: float = 5.0, seed: int = 0) -> Any:
    """One data set of several, drawn with the probabilities of [`temperature_sampling`] until each was used up.

    Args:
        datasets (`Mapping[str, datasets.Dataset]`): By name, such as `"de"` and `"en-de"`; same columns or a subset.
        temperature (`float`, defaults to 5.0): S.
        seed (`int`, defaults to 0): Of the draw.

    Returns:
        `datasets.Dataset`
    """
    try:
        from datasets import interleave_datasets
    except ImportError as error:
        raise ImportError("`interleave_tasks` needs the package `datasets`: pip install datasets.") from error
    parts = list(datasets.values())
    probabilities = temperature_sampling([len(part) for part in parts], temperature)
    return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")
