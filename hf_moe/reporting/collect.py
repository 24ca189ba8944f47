"""One pass over texts that collects what a routing report shows, a batch at a time.

Shapes: B batch, S sequence, T = B * S tokens, L MoE layers, N experts, K per token.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_moe.metrics.summary import marginal_entropy
from hf_moe.routing.layer_routing import LayerRouting
from hf_moe.routing.statistics import RouterStats
from hf_moe.views import MoeLayerView, RoutingRecorder, record_routing, unwrap_model

from .cooccurrence import CoActivation, TokenExpertCounts
from .report import LayerReport, RoutingReport, TokenExample
from .windows import check_tokenizer, token_batches, token_windows


__all__ = ["routing_report"]

logger = logging.get_logger(__name__)

DEFAULT_MAX_LENGTH = 512


@torch.no_grad()
def routing_report(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_tokens: int | None = None,
    examples_per_expert: int = 12,
    model_name: str | None = None,
    show_progress: bool = False,
) -> RoutingReport:
    """Runs `model` over `texts` and reports how it routed them.

    Texts are read one by one and cut into windows, so memory does not grow with their length. Logits over the
    vocabulary are not computed. The model is put in eval mode for the pass and back afterwards.

    Args:
        model (`nn.Module`): Any model that [`hf_moe.moe_layers`] accepts, on the device it should run on.
        tokenizer: Its tokenizer.
        texts (`Iterable[str]`): What to route.
        batch_size (`int`, defaults to 8): Windows per forward pass.
        max_length (`int`, *optional*): Tokens of a window; by default 512, or the model's longest if that is less.
        max_tokens (`int`, *optional*): Stop after this many tokens; all by default.
        examples_per_expert (`int`, defaults to 12): Typical tokens to keep of each expert.
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
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    inner = unwrap_model(model)
    embedding: Any = inner.get_input_embeddings().weight  # (V, D)
    check_tokenizer(tokenizer, embedding.shape[0])
    trunk = inner.base_model  # without the head, whose logits nobody looks at
    if max_length is None:
        longest = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
        max_length = min(DEFAULT_MAX_LENGTH, longest or DEFAULT_MAX_LENGTH)
    batches = token_batches(
        token_windows(tokenizer, texts, max_length, max_tokens), batch_size, tokenizer.pad_token_id
    )
    training = inner.training
    inner.eval()
    try:
        with (
            record_routing(inner, offload=True) as recorder,
            logging.tqdm(total=max_tokens, unit="token", desc="Routing", disable=not show_progress) as bar,
        ):
            collector = Collector(recorder, vocabulary=embedding.shape[0])
            for input_ids, attention_mask in batches:
                device = embedding.device
                trunk(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
                collector.take(input_ids.flatten(), attention_mask.flatten().bool())
                bar.update(int(attention_mask.sum()))
    finally:
        inner.train(training)
    return collector.report(tokenizer, examples_per_expert, model_name or _name_of(inner))


class Collector:
    """Sums over batches; knows how to turn them into a [`RoutingReport`]."""

    def __init__(self, recorder: RoutingRecorder, vocabulary: int):
        self.recorder = recorder
        self.views: list[MoeLayerView] = [layer.view for layer in recorder.layers]
        self.stats = RouterStats()
        self.occurrences = torch.zeros(vocabulary, dtype=torch.int64)
        self.coactivation = [CoActivation(view.num_experts) for view in self.views]
        self.tokens = [TokenExpertCounts(view.num_experts) for view in self.views]

    def take(self, token_ids: torch.Tensor, token_mask: torch.Tensor) -> None:
        """Adds what was recorded of one batch, and forgets it.

        Args:
            token_ids (`torch.Tensor` of shape `(T,)`): The batch, flattened.
            token_mask (`torch.Tensor` of shape `(T,)`): `False` on padding.
        """
        layers = []
        for record in self.recorder.layers:
            if len(record.top_k_index) != 1 or record.top_k_index[0].shape[0] != token_ids.shape[0]:
                routed = [index.shape[0] for index in record.top_k_index]
                raise ValueError(
                    f"The router of {record.view.name!r} was called with {routed} tokens for a batch of "
                    f"{token_ids.shape[0]}. Reports need models that route every token exactly once per layer."
                )
            index = record.top_k_index[0]
            layers.append(LayerRouting(record.router_logits[0], index, record.view.probabilities))
        self.stats.update(layers, token_mask)
        token_ids = token_ids[token_mask]
        self.occurrences += torch.bincount(token_ids, minlength=self.occurrences.shape[0])
        for layer, together, tokens in zip(layers, self.coactivation, self.tokens, strict=True):
            index = layer.index[token_mask]
            together.update(index)
            tokens.update(token_ids, index)
        self.recorder.clear()

    def report(self, tokenizer: Any, examples_per_expert: int, model_name: str) -> RoutingReport:
        """The report of everything taken so far.

        Raises:
            ValueError: nothing was.
        """
        if not self.occurrences.any():
            raise ValueError("`texts` holds no token: there is nothing to report. Pass texts that are not empty.")
        summary = self.stats.compute()
        of_the_mean = marginal_entropy(summary)
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
                )
            )
        return RoutingReport(model_name, summary.num_tokens, layers)


def _text_of(tokenizer: Any, token_id: int) -> str:
    """A token as a reader sees it; pieces of a character keep the tokenizer's own spelling."""
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return tokenizer.convert_ids_to_tokens(token_id) if not text or "\ufffd" in text else text


def _name_of(model: nn.Module) -> str:
    """The Hub id or the last part of a local path: where a folder lies on this machine is nobody's business."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    return (Path(source).resolve().name if os.path.isdir(source) else source) or type(model).__name__
