"""The routing of a text, token by token: what two models, or one model at two times, are compared by.

Shapes: T tokens, N experts, K per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_moe.views import moe_layers, unwrap_model

from .collect import check_arguments, model_title
from .passes import RoutedBatch, longest_window, route
from .windows import check_tokenizer, token_batches, token_windows


__all__ = ["LayerSnapshot", "RoutingSnapshot", "SnapshotCollector", "routing_snapshot"]


@dataclass
class LayerSnapshot:
    """Routing of one MoE layer.

    Args:
        name (`str`): Path of the block in the model.
        num_experts (`int`): N.
        expert_labels (`list[str]`): A short name per expert.
        index (`torch.Tensor` of shape `(T, K)`): Chosen experts, int16; N on empty slots.
        probabilities (`torch.Tensor` of shape `(T, N)`): The router's distributions, float16.
    """

    name: str
    num_experts: int
    expert_labels: list[str]
    index: torch.Tensor
    probabilities: torch.Tensor


@dataclass
class RoutingSnapshot:
    """Routing of a text by a model; made by [`routing_snapshot`], compared by [`routing_shift`].

    Args:
        name (`str`): What was looked at.
        token_ids (`torch.Tensor` of shape `(T,)`): The tokens, without padding.
        layers (`list[LayerSnapshot]`): One per MoE layer.

    Example:
        ```python
        before = routing_snapshot(model, tokenizer, texts)
        trainer.train()
        shift = routing_shift(before, routing_snapshot(model, tokenizer, texts))
        ```
    """

    name: str
    token_ids: torch.Tensor
    layers: list[LayerSnapshot]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


def routing_snapshot(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_tokens: int | None = 10_000,
    name: str | None = None,
    show_progress: bool = False,
) -> RoutingSnapshot:
    """Keeps how a model routes texts. Unlike a [`RoutingReport`] it grows with them: T (2 N + 2 K) bytes per layer.

    Args:
        model (`nn.Module`): Any model that [`hf_moe.moe_layers`] accepts, on the device it should run on.
        tokenizer: Its tokenizer.
        texts (`Iterable[str]`): What to route.
        batch_size (`int`, defaults to 8): Windows per forward pass.
        max_length (`int`, *optional*): Tokens of a window; by default 512, or the model's longest if that is less.
        max_tokens (`int`, *optional*, defaults to 10,000): Stop after this many tokens.
        name (`str`, *optional*): Title; by default what the model was loaded from.
        show_progress (`bool`, defaults to `False`): Draw a progress bar.

    Returns:
        [`RoutingSnapshot`]

    Raises:
        ValueError: as [`routing_report`] does.

    Example:
        ```python
        snapshot = routing_snapshot(model, tokenizer, ["The river runs past the old mill."])
        snapshot.layers[0].index[:, 0]  # the first choice of every token
        ```
    """
    check_arguments(batch_size=batch_size, max_length=max_length, max_tokens=max_tokens)
    inner: Any = unwrap_model(model)
    check_tokenizer(tokenizer, inner.get_input_embeddings().weight.shape[0])
    collector = SnapshotCollector(moe_layers(inner))
    windows = token_windows(tokenizer, texts, max_length or longest_window(inner.config), max_tokens)
    with logging.tqdm(total=max_tokens, unit="token", desc="Routing", disable=not show_progress) as bar:

        def take(batch: RoutedBatch) -> None:
            collector.take(batch)
            bar.update(int(batch.token_mask.sum()))

        route(inner, token_batches(windows, batch_size, tokenizer.pad_token_id), take)
    return collector.snapshot(name or model_title(inner))


class SnapshotCollector:
    """Keeps batches; knows how to turn them into a [`RoutingSnapshot`].

    Args:
        views (`list[MoeLayerView]`): The layers that will be taken.
    """

    def __init__(self, views: list):
        self.views = views
        self._tokens: list[torch.Tensor] = []
        self._index: list[list[torch.Tensor]] = [[] for _ in views]
        self._probabilities: list[list[torch.Tensor]] = [[] for _ in views]

    def take(self, batch: RoutedBatch) -> None:
        """Adds a batch.

        Args:
            batch ([`RoutedBatch`]): Its routing is kept, without padding.
        """
        mask = batch.token_mask
        self._tokens.append(batch.token_ids[mask])
        for row, layer in enumerate(batch.layers):
            self._index[row].append(layer.index[mask].to(torch.int16))
            self._probabilities[row].append(layer.distribution()[mask].to(torch.float16))

    def snapshot(self, name: str) -> RoutingSnapshot:
        """The snapshot of everything taken so far.

        Args:
            name (`str`): Its title.

        Returns:
            [`RoutingSnapshot`]

        Raises:
            ValueError: nothing was taken.
        """
        if not self._tokens:
            raise ValueError("`texts` holds no token: there is nothing to compare. Pass texts that are not empty.")
        layers = [
            LayerSnapshot(view.name, view.num_experts, view.expert_labels, torch.cat(index), torch.cat(probabilities))
            for view, index, probabilities in zip(self.views, self._index, self._probabilities, strict=True)
        ]
        return RoutingSnapshot(name, torch.cat(self._tokens), layers)
