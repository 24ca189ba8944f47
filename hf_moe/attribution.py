"""Which experts a set of texts relies on (SEUF, arXiv 2411.18797, Sec. 4.1).

Shapes: B batch, S sequence, T = B * S tokens, N experts, K per token.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .files import write_text
from .modes import eval_mode
from .views import LayerRecord, MoeLayerView, Routing, record_routing, unwrap_model


__all__ = ["ExpertScore", "ExpertScores", "attribute_experts", "dense_weights", "pad_token_rows"]

logger = logging.get_logger(__name__)

STATE_VERSION = 1


class ExpertScore(NamedTuple):
    """How much one routed expert takes part in a set of texts.

    Args:
        layer (`str`): Name of its MoE layer, as in [`~hf_moe.moe_layers`].
        expert (`int`): Its number in that layer.
        score (`float`): Mean routing weight.
    """

    layer: str
    expert: int
    score: float


class ExpertScores:
    """What [`attribute_experts`] returns: a score for every routed expert; iterates best first.

    Args:
        layers (`Mapping[str, Sequence[float]]`): Scores of each MoE layer's experts, by the layer's name.
        num_sequences (`int`): Sequences they were averaged over.
        num_tokens (`int`): Tokens in these sequences, padding left out.

    Example:
        ```python
        scores = attribute_experts(model, forget_dataset)
        scores.best(1)  # [ExpertScore(layer="model.layers.11.mlp", expert=3, score=0.61)]
        config = hf_moe.ExpertSliceConfig(layers=scores.targets(1))
        ```
    """

    def __init__(self, layers: Mapping[str, Sequence[float]], num_sequences: int, num_tokens: int):
        self.layers = {name: [float(score) for score in scores] for name, scores in layers.items()}
        self.num_sequences = num_sequences
        self.num_tokens = num_tokens

    def __iter__(self) -> Iterator[ExpertScore]:
        every = [ExpertScore(name, e, s) for name, scores in self.layers.items() for e, s in enumerate(scores)]
        return iter(sorted(every, key=lambda score: -score.score))  # stable: ties stay in the order of the layers

    def __len__(self) -> int:
        return sum(len(scores) for scores in self.layers.values())

    def __repr__(self) -> str:
        best = ", ".join(f"{name}[{expert}]={score:.4f}" for name, expert, score in islice(self, 3))
        return f"ExpertScores({len(self)} experts in {len(self.layers)} layers, {self.num_tokens} tokens; {best}, ...)"

    def best(self, m: int = 1, *, same_layer: bool = False) -> list[ExpertScore]:
        """The `m` experts with the highest scores.

        Args:
            m (`int`, defaults to 1): How many; 1 is best in the paper's Table 4.
            same_layer (`bool`, defaults to `False`): Only experts of the layer of the very best one.

        Returns:
            `list[ExpertScore]`, best first.

        Raises:
            ValueError: there are not that many.
        """
        ranked = list(self)
        if same_layer and ranked:
            ranked = [score for score in ranked if score.layer == ranked[0].layer]
        if not 1 <= m <= len(ranked):
            where = f"the experts of layer {ranked[0].layer!r}" if same_layer and ranked else "all experts"
            raise ValueError(f"`m` must be between 1 and the number of {where} ({len(ranked)}), got {m}.")
        return ranked[:m]

    def targets(self, m: int = 1, *, same_layer: bool = True) -> dict[str, list[int]]:
        """The `m` best experts as [`~hf_moe.ExpertSliceConfig`] wants them: numbers by layer name.

        Args:
            m (`int`, defaults to 1): How many.
            same_layer (`bool`, defaults to `True`): As in `best`.

        Returns:
            `dict[str, list[int]]`
        """
        targets: dict[str, list[int]] = {}
        for name, expert, _ in self.best(m, same_layer=same_layer):
            targets.setdefault(name, []).append(expert)
        return {name: sorted(experts) for name, experts in targets.items()}

    def to_json(self, path: str | os.PathLike) -> Path:
        """Writes the scores to a file.

        Args:
            path (`str` or `os.PathLike`): The file; an old one is replaced at once.

        Returns:
            `Path`
        """
        content = {"num_sequences": self.num_sequences, "num_tokens": self.num_tokens, "layers": self.layers}
        return write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "ExpertScores":
        """Reads what `to_json` wrote.

        Args:
            path (`str` or `os.PathLike`): The file.

        Returns:
            [`ExpertScores`]
        """
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@torch.no_grad()
def attribute_experts(
    model: nn.Module,
    data: Any,
    n_tokens: int | None = 100_000,
    *,
    batch_size: int = 8,
    state_path: str | os.PathLike | None = None,
    resume_from: str | os.PathLike | None = None,
    save_every: int = 50,
    show_progress: bool = True,
) -> ExpertScores:
    r"""Scores every routed expert by the weight it gets on `data`, in one pass without gradients.

    s_i = 1/Z sum_j 1/L_j sum_t g_{i,t}, over Z sequences of L_j tokens, where g is the weight with which expert i's
    output is added, exactly as the experts receive it, and 0 for the experts a token is not sent to. The mean within a
    sequence comes first, so that long sequences count no more than short ones; padding does not count. 100,000 tokens
    are enough (their top 6 overlaps that of the full set by 0.94 in the paper).

    Memory does not grow with the number of tokens. Shared experts have no routing weight and zero-computation experts
    nothing to train: neither has a score.

    Args:
        model (`nn.Module`): Any model that [`~hf_moe.moe_layers`] accepts, also wrapped. It is put in eval mode for
            the pass and back afterwards.
        data: A data loader, or another iterable, of batches (mappings with `input_ids` `(B, S)` and optionally
            `attention_mask` `(B, S)`); or a dataset of rows with `input_ids`, which are batched here. One row is one
            sequence. Use the text as the model will see it, chat template included.
        n_tokens (`int`, *optional*, defaults to 100,000): Stop after the batch that reaches this many tokens; `None`
            for all of `data`.
        batch_size (`int`, defaults to 8): Rows per batch of a dataset.
        state_path (`str` or `os.PathLike`, *optional*): Where to keep what was counted so far, every `save_every`
            batches and when the pass ends, also by an exception or Ctrl-C.
        resume_from (`str` or `os.PathLike`, *optional*): Such a file: the batches counted in it are skipped. `data`
            must come in the same order.
        save_every (`int`, defaults to 50): Batches between two writes of the state.
        show_progress (`bool`, defaults to `True`): Draw a progress bar.

    Returns:
        [`ExpertScores`]

    Raises:
        ValueError: no MoE layer; no token in `data`, or a batch of nothing but padding; `resume_from` belongs to
            another model; an argument out of range.
        TypeError: a batch or row without `input_ids`.

    Example:
        ```python
        scores = hf_moe.attribute_experts(model, forget_loader, state_path="scores.state.json")
        for layer, expert, score in scores.best(6):
            logger.info(f"{layer} expert {expert}: {score:.3f}")
        ```
    """
    for name, value in (("n_tokens", n_tokens), ("batch_size", batch_size), ("save_every", save_every)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    inner = unwrap_model(model)
    trunk = inner.base_model  # without the head, whose logits nobody looks at
    embedding: Any = inner.get_input_embeddings().weight
    device = embedding.device
    with record_routing(inner) as recorder, eval_mode(inner):
        totals = _Totals([record.view for record in recorder.layers])
        if resume_from is not None:
            totals.load(resume_from)
        done = totals.batches
        bar = logging.tqdm(total=n_tokens, initial=totals.tokens, unit="token", disable=not show_progress)
        try:
            for number, batch in enumerate(_batches(data, batch_size, skip=done), start=done):
                if n_tokens is not None and totals.tokens >= n_tokens:
                    break
                inputs, mask = _inputs(batch, number, device)
                trunk(**inputs, use_cache=False)
                before = totals.tokens
                totals.add(recorder.layers, mask)
                recorder.clear()
                bar.update(totals.tokens - before)
                if state_path is not None and totals.batches % save_every == 0:
                    totals.save(state_path)
        finally:
            bar.close()
            if state_path is not None:
                totals.save(state_path)
    return totals.scores()


def dense_weights(view: MoeLayerView, routing: Routing) -> torch.Tensor:
    """Routing weights with a column per expert, 0 where a token is not sent.

    Args:
        view ([`~hf_moe.views.MoeLayerView`]): The layer.
        routing ([`~hf_moe.views.Routing`]): What its router decided.

    Returns:
        `torch.Tensor` of shape `(T, N)`: With the gradient of the weights, in their dtype.
    """
    weights, index = routing.top_k_weights, routing.top_k_index
    columns = view.num_experts + 1  # the last one collects empty slots
    return weights.new_zeros(weights.shape[0], columns).scatter_add(-1, index, weights)[:, :-1]


def pad_token_rows(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch of rows of unequal lengths, padded on the right.

    Args:
        rows (`Sequence[Mapping]`): With `input_ids`, and optionally `attention_mask` and `labels`, of one length each.
        pad_token_id (`int`, defaults to 0): Fills `input_ids`; never attended to.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, each `(B, S)`; labels are the input ids
        where a row has none, and -100 wherever the mask is 0.

    Raises:
        TypeError: a row has no `input_ids`.
        ValueError: a row's columns differ in length.
    """
    padded: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        if not isinstance(row, Mapping) or "input_ids" not in row:
            has = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise TypeError(f"Rows need a column `input_ids`, got {has}. Tokenize the texts first.")
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids)), dtype=torch.int64)
        labels = torch.as_tensor(row.get("labels", ids), dtype=torch.int64)
        if not ids.shape == mask.shape == labels.shape:
            raise ValueError(f"A row's columns differ in length: {len(ids)}, {len(mask)}, {len(labels)}.")
        for name, column in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
            padded[name].append(column.masked_fill(mask == 0, -100) if name == "labels" else column)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad(columns, batch_first=True, padding_value=fill[name]) for name, columns in padded.items()}


class _Totals:
    """Sums over the sequences seen so far: constant size, float64."""

    def __init__(self, views: list[MoeLayerView]):
        self.sums = {view.name: torch.zeros(view.num_computing_experts, dtype=torch.float64) for view in views}
        self.sequences = self.tokens = self.batches = 0

    def add(self, records: list[LayerRecord], mask: torch.Tensor) -> None:
        lengths = mask.sum(dim=1)  # (B,)
        for record in records:
            routed = [index.shape[0] for index in record.top_k_index]
            if routed != [mask.numel()]:
                raise ValueError(
                    f"The router of {record.view.name!r} was called with {routed} tokens for a batch of "
                    f"{mask.numel()}. Attribution needs models that route every token exactly once per layer."
                )
        means = {}
        for record in records:
            routing = Routing(record.router_logits[0], record.top_k_weights[0], record.top_k_index[0])
            weights = dense_weights(record.view, routing)[:, : record.view.num_computing_experts].double()
            weights = weights.reshape(*mask.shape, -1) * mask.unsqueeze(-1)  # (B, S, N)
            means[record.view.name] = weights.sum(dim=1) / lengths.clamp_min(1).unsqueeze(-1)  # (B, N)
        for name, mean in means.items():  # all or, if interrupted above, nothing of a batch
            self.sums[name] += mean.sum(dim=0).cpu()
        self.sequences += int((lengths > 0).sum())
        self.tokens += int(lengths.sum())
        self.batches += 1

    def save(self, path: str | os.PathLike) -> None:
        counts = {"batches": self.batches, "sequences": self.sequences, "tokens": self.tokens}
        sums = {name: total.tolist() for name, total in self.sums.items()}
        write_text(path, json.dumps({"version": STATE_VERSION, **counts, "sums": sums}))

    def load(self, path: str | os.PathLike) -> None:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"`resume_from` ({str(path)!r}) is no state of `attribute_experts`.")
        sizes = {name: len(total) for name, total in state["sums"].items()}
        own = {name: len(total) for name, total in self.sums.items()}
        if sizes != own:
            raise ValueError(
                f"`resume_from` ({str(path)!r}) was written for a model with other MoE layers: it has "
                f"{len(sizes)} layers with {sum(sizes.values())} experts, `model` {len(own)} with {sum(own.values())}."
            )
        self.sums = {name: torch.tensor(total, dtype=torch.float64) for name, total in state["sums"].items()}
        self.batches, self.sequences, self.tokens = state["batches"], state["sequences"], state["tokens"]

    def scores(self) -> ExpertScores:
        if not self.sequences:
            raise ValueError("`data` holds no token to attribute. Pass a forget set that is not empty.")
        layers = {name: (total / self.sequences).tolist() for name, total in self.sums.items()}
        return ExpertScores(layers, self.sequences, self.tokens)


def _batches(data: Any, batch_size: int, skip: int) -> Iterable[Any]:
    """Batches of a loader as they are, rows of a dataset put together; the first `skip` left out."""
    if isinstance(data, torch.utils.data.DataLoader) or not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        return islice(data, skip, None)
    if len(data) and isinstance(data[0], Mapping) and torch.as_tensor(data[0].get("input_ids", [])).dim() == 2:
        return islice(data, skip, None)  # a list of batches
    starts = range(skip * batch_size, len(data), batch_size)
    return (pad_token_rows([data[i] for i in range(s, min(s + batch_size, len(data)))]) for s in starts)


def _inputs(batch: Any, number: int, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model is given, and the token mask `(B, S)`."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"Batches of `data` need `input_ids`, got {has}. Let the loader return mappings of tensors.")
    inputs = {name: v.to(device) for name, v in batch.items() if isinstance(v, torch.Tensor) and name != "labels"}
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    if mask.shape != inputs["input_ids"].shape:
        raise ValueError(
            f"`attention_mask` of batch {number} has shape {tuple(mask.shape)}, `input_ids` "
            f"{tuple(inputs['input_ids'].shape)}: attribution needs a mask of tokens, `(B, S)`."
        )
    if not mask.any():
        raise ValueError(
            f"Batch {number} of `data` is nothing but padding: its `attention_mask` is 0 everywhere. Leave out empty "
            "texts, or check what 0 and 1 mean in the mask."
        )
    return inputs, mask.bool()
