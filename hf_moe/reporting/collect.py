"""One pass over texts that collects what a routing report shows, a batch at a time.

Shapes: B batch, S sequence, T = B * S tokens, L MoE layers, N experts, K per token.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from hf_moe.active_compute import active_compute
from hf_moe.metrics.summary import marginal_entropy
from hf_moe.routing.statistics import RouterStats
from hf_moe.views import MoeLayerView, moe_layers, unwrap_model

from .cooccurrence import CoActivation, TokenExpertCounts
from .groups import PositionCounts, in_order, loads_of
from .passes import RoutedBatch, longest_window, route
from .report import LayerReport, RoutingReport, TokenExample
from .token_classes import POSITION_BINS, TOKEN_CLASSES, class_of_each_id, position_bin
from .windows import check_tokenizer, token_batches, token_windows


__all__ = ["Collector", "check_arguments", "model_title", "routing_report"]

logger = logging.get_logger(__name__)


def routing_report(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_tokens: int | None = None,
    examples_per_expert: int = 12,
    token_classes: Callable[[str], str] | None = None,
    model_name: str | None = None,
    show_progress: bool = False,
) -> RoutingReport:
    """Runs `model` over `texts` and reports how it routed them.

    Texts are read one by one and cut into windows, so memory does not grow with their length. Logits over the
    vocabulary are not computed. The model is put in eval mode for the pass and back afterwards.

    Args:
        model (`nn.Module`): Any model that [`hf_moe.moe_layers`] accepts, on the device it should run on.
        tokenizer: Its tokenizer; for batches with images, its processor.
        texts (`Iterable[str]`): What to route. Or batches as a processor returns them, with images: they are run as
            they are, and the tokens that stand for images are of class `"image"`.
        batch_size (`int`, defaults to 8): Windows per forward pass.
        max_length (`int`, *optional*): Tokens of a window; by default 512, or the model's longest if that is less.
        max_tokens (`int`, *optional*): Stop after this many tokens; all by default.
        examples_per_expert (`int`, defaults to 12): Typical tokens to keep of each expert.
        token_classes (`Callable[[str], str]`, *optional*): Text of a token to the name of its class, for the tables of
            routing by class; [`~hf_moe.reporting.token_class`] by default.
        model_name (`str`, *optional*): Title of the report; by default what the model was loaded from.
        show_progress (`bool`, defaults to `False`): Draw a progress bar.

    Returns:
        [`RoutingReport`]

    Raises:
        ValueError: no MoE layer, an unknown family, a tokenizer larger than the embedding, no text, or an argument
            out of range.

    Example:
        ```python
        report = routing_report(model, tokenizer, open("book.txt").read().split("\\n\\n"), max_tokens=20_000)
        report.save("routing-report")
        ```
    """
    check_arguments(batch_size=batch_size, max_length=max_length, max_tokens=max_tokens)
    inner: Any = unwrap_model(model)
    collector = Collector(moe_layers(inner), vocabulary=inner.get_input_embeddings().weight.shape[0])
    words = getattr(tokenizer, "tokenizer", tokenizer)
    check_tokenizer(words, collector.occurrences.shape[0])
    rows: Any = iter(texts)
    first = next(rows, None)
    rows = rows if first is None else chain([first], rows)
    if isinstance(first, Mapping):
        batches: Any = _up_to(max_tokens, rows)
    else:
        windows = token_windows(words, rows, max_length or longest_window(inner.config), max_tokens)
        batches = token_batches(windows, batch_size, words.pad_token_id)
    with logging.tqdm(total=max_tokens, unit="token", desc="Routing", disable=not show_progress) as bar:

        def take(batch: RoutedBatch) -> None:
            collector.take(batch)
            bar.update(int(batch.token_mask.sum()))

        route(inner, batches, take)
    report = collector.report(tokenizer, examples_per_expert, model_name or model_title(inner), token_classes)
    compute = active_compute(inner)
    report.flops_per_token = compute.flops([layer.active_computing_experts for layer in report.layers])
    report.flops_share = report.flops_per_token / max(compute.flops(compute.num_experts), 1.0)
    return report


def _up_to(max_tokens: int | None, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches until they hold that many tokens; the last one is not cut."""
    tokens = 0
    for batch in batches:
        if max_tokens is not None and tokens >= max_tokens:
            return
        tokens += int(batch["attention_mask"].sum())
        yield batch


class Collector:
    """Sums over batches; knows how to turn them into a [`RoutingReport`].

    Args:
        views (`list[MoeLayerView]`): The layers that will be taken.
        vocabulary (`int`): Ids there can be.
    """

    def __init__(self, views: list[MoeLayerView], vocabulary: int):
        self.views = views
        self.stats = RouterStats()
        self.occurrences = torch.zeros(vocabulary, dtype=torch.int64)
        self.positions = torch.zeros(len(POSITION_BINS), dtype=torch.int64)
        self.coactivation = [CoActivation(view.num_experts) for view in views]
        self.tokens = [TokenExpertCounts(view.num_experts) for view in views]
        self.by_position = [PositionCounts(view.num_experts) for view in views]

    def take(self, batch: RoutedBatch) -> None:
        """Adds a batch.

        Args:
            batch ([`RoutedBatch`]): Kept nowhere.
        """
        mask = batch.token_mask
        self.stats.update(batch.layers, mask)
        token_ids, bins = batch.token_ids[mask], position_bin(batch.positions[mask])
        self.occurrences += torch.bincount(token_ids, minlength=self.occurrences.shape[0])
        self.positions += torch.bincount(bins, minlength=len(POSITION_BINS))
        for row, layer in enumerate(batch.layers):
            index = layer.index[mask]
            self.coactivation[row].update(index)
            self.tokens[row].update(token_ids, index)
            self.by_position[row].update(bins, index)

    def reduce(self) -> "Collector":
        """The sum over processes; every process must call it, and must have taken a batch.

        Returns:
            [`Collector`]: A new one, or this one where there is a single process.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self
        total = Collector(self.views, self.occurrences.shape[0])
        parts: list[Any] = [None] * dist.get_world_size()
        rows = [(c.counts, t.pairs(), p.counts) for c, t, p in self._rows()]
        # Objects, whatever the backend: NCCL reduces nothing on the CPU.
        dist.all_gather_object(parts, (self.stats, self.occurrences, self.positions, rows))
        for stats, occurrences, positions, rows in parts:
            total.stats.add(stats)
            total.occurrences += occurrences
            total.positions += positions
            for (together, tokens, by_position), (c, t, p) in zip(total._rows(), rows, strict=True):
                together.counts += c
                tokens.add(*t)
                by_position.counts += p
        return total

    def _rows(self) -> list[tuple[CoActivation, TokenExpertCounts, PositionCounts]]:
        return list(zip(self.coactivation, self.tokens, self.by_position, strict=True))

    def report(
        self,
        tokenizer: Any,
        examples_per_expert: int,
        model_name: str,
        classes: Callable[[str], str] | None = None,
    ) -> RoutingReport:
        """The report of everything taken so far.

        Args:
            tokenizer: A transformers tokenizer, or a processor.
            examples_per_expert (`int`): Typical tokens to keep of each expert.
            model_name (`str`): Title of the report.
            classes (`Callable[[str], str]`, *optional*): As in [`routing_report`].

        Returns:
            [`RoutingReport`]

        Raises:
            ValueError: nothing was.
        """
        if not self.occurrences.any():
            raise ValueError("`texts` holds no token: there is nothing to report. Pass texts that are not empty.")
        summary = self.stats.compute()
        of_the_mean = marginal_entropy(summary)
        seen = torch.nonzero(self.occurrences).flatten().tolist()
        class_of = class_of_each_id(tokenizer, seen, classes)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        names = in_order(class_of.values(), TOKEN_CLASSES)
        class_sizes = dict.fromkeys(names, 0)
        for token_id in seen:
            class_sizes[class_of[token_id]] += int(self.occurrences[token_id])
        positions = {name: n for name, n in zip(POSITION_BINS, self.positions.tolist(), strict=True) if n}
        layers = []
        for row, view in enumerate(self.views):
            n = view.num_experts
            counts, load = summary.counts[row, :n], summary.load[row, :n]
            typical = self.tokens[row].typical(self.occurrences, examples_per_expert)
            layers.append(
                LayerReport(
                    name=view.name,
                    num_experts=n,
                    num_experts_per_tok=view.num_experts_per_tok,
                    expert_labels=view.expert_labels,
                    counts=counts.tolist(),
                    load=load.tolist(),
                    entropy=summary.entropy[row].item(),
                    marginal_entropy=of_the_mean[row].item(),
                    max_violation=summary.max_violation[row].item(),
                    dead_experts=torch.nonzero(counts == 0).flatten().tolist(),
                    active_experts=summary.active_experts[row].item(),
                    active_computing_experts=counts[: view.num_computing_experts].sum().item() / summary.num_tokens,
                    coactivation=self.coactivation[row].counts.tolist(),
                    examples=[
                        [TokenExample(_text_of(tokenizer, token.token_id), *token) for token in expert]
                        for expert in typical
                    ],
                    class_load=loads_of(names, self.tokens[row].by_class(class_of, names)),
                    position_load=loads_of(positions, self.by_position[row].counts[self.positions > 0]),
                )
            )
        return RoutingReport(model_name, summary.num_tokens, layers, class_sizes, positions)


def _text_of(tokenizer: Any, token_id: int) -> str:
    """A token as a reader sees it; pieces of a character keep the tokenizer's own spelling."""
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return tokenizer.convert_ids_to_tokens(token_id) if not text or "\ufffd" in text else text


def check_arguments(**sizes: int | None) -> None:
    """Refuses sizes below 1.

    Args:
        **sizes (`int`, *optional*): Name to value; `None` is allowed.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def model_title(model: nn.Module) -> str:
    """The Hub id or the last part of a local path: where a folder lies on this machine is nobody's business.

    Args:
        model (`nn.Module`): A transformers model, without wrapper.

    Returns:
        `str`
    """
    config: Any = model.config
    source = str(getattr(config, "_name_or_path", "") or "")
    return (Path(source).resolve().name if os.path.isdir(source) else source) or type(model).__name__
