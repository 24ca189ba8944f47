"""What domain adapters and feed-forward networks give for the same input, and what the gates decide.

Shapes: B batch, S sequence, F width of the feed-forward network's inside, D hidden, n domains.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hf_moe.views import in_backward, is_compiled

from .layer import MixdaLayer


__all__ = ["GateRecorder", "KnowledgeRecorder", "record_gates", "record_knowledge", "sampling_loss"]


class KnowledgeRecorder:
    """The inputs `x` and outputs `F(x)` of the feed-forward networks beside which domain adapters are.

    Both are kept without their graphs, so that gradients of a loss on [`~KnowledgeRecorder.pairs`] reach the domain
    adapters and nothing else, whatever gradient checkpointing does with the forward call.

    Args:
        model (`nn.Module`): A model with MixDA adapters.
        adapter_name (`str`, *optional*): Which adapter; in each layer the active ones if left out.

    Raises:
        ValueError: The model has no such domain adapters.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None):
        self.adapters: list[tuple[MixdaLayer, str]] = []
        for layer in model.modules():
            if isinstance(layer, MixdaLayer):
                names = layer.active_adapters if adapter_name is None else [adapter_name]
                self.adapters += [(layer, name) for name in names if layer.cell("expert", name) is not None]
        if not self.adapters:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no domain adapters"
                + (f" of the adapter {adapter_name!r}." if adapter_name else ".")
            )
        self.records: dict[MixdaLayer, list[tuple[torch.Tensor, torch.Tensor]]] = {
            layer: [] for layer, _ in self.adapters
        }

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`(F(x), K_j(x))` for each call, layer and enabled domain.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: Two tensors of shape `(B, S, D)`, the first without a graph.
        """
        found = []
        for layer, adapter_name in self.adapters:
            experts, gate = layer.cell("expert", adapter_name), layer.cell("gate", adapter_name)
            for x, output in self.records[layer]:
                for domain in gate.enabled:
                    expert = experts[domain]
                    found.append((output.to(expert.up.weight.dtype), expert(x.to(expert.down.weight.dtype))))
        return found

    def loss(self, attention_mask: torch.Tensor | None = None, reduction: str = "mean") -> torch.Tensor:
        """[`sampling_loss`] of the pairs."""
        return sampling_loss(self.pairs(), attention_mask, reduction)


class _Enough(Exception):
    """All layers have been recorded."""


@contextmanager
def record_knowledge(
    model: nn.Module, adapter_name: str | None = None, *, stop: bool = False
) -> Iterator[KnowledgeRecorder]:
    """Records what the feed-forward networks with domain adapters get and give in the calls inside the block.

    Calls that gradient checkpointing repeats in the backward pass are not recorded again.

    Args:
        model (`nn.Module`): A model with MixDA adapters.
        adapter_name (`str`, *optional*): Which adapter; the active ones if left out.
        stop (`bool`, defaults to `False`): End the block, and the call it is in, when every layer has been recorded
            once: the layers after the last domain adapter need not run.

    Yields:
        [`KnowledgeRecorder`]

    Raises:
        ValueError: The model has no such domain adapters.

    Example:
        ```python
        with record_knowledge(model, stop=True) as recorder, torch.no_grad():
            model(**general_text)
        recorder.loss(general_text["attention_mask"]).backward()  # L_S
        ```
    """
    recorder = KnowledgeRecorder(model, adapter_name)

    def record(layer: MixdaLayer, x: torch.Tensor, output: torch.Tensor) -> None:
        if not in_backward():
            recorder.records[layer].append((x.detach(), output.detach()))
            if stop and all(recorder.records.values()):
                raise _Enough

    def hook(layer: MixdaLayer) -> Callable[..., None]:
        return lambda module, args, output: record(layer, args[0], output)

    with _hooked(model, ((layer.base_layer, hook(layer)) for layer in recorder.records)):
        try:
            yield recorder
        except _Enough:
            pass


def sampling_loss(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    attention_mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""`L_S = 1/L sum_l ||F_l - K_l||^2`: on ordinary text a domain adapter shall do what the old network did.

    Args:
        pairs (`Iterable[tuple[torch.Tensor, torch.Tensor]]`): L pairs `(F, K)`, each of shape `(..., D)`. No gradient
            reaches `F`.
        attention_mask (`torch.Tensor` of shape `(...)`, *optional*): 0 at positions that do not count.
        reduction (`str`, defaults to `"mean"`): Over positions and D, as in the released code; `"sum"` is the paper's
            norm.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: `reduction` is neither, or there are no pairs.

    Example:
        ```python
        F, K = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        sampling_loss([(F, K)], reduction="sum")  # 30
        ```
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}.")
    losses = []
    for base, knowledge in pairs:
        square = (base.detach() - knowledge).float().square()  # (..., D)
        if attention_mask is not None:
            square = square[attention_mask.reshape(square.shape[:-1]).bool()]  # (T, D)
        losses.append(square.sum() if reduction == "sum" else square.mean())
    if not losses:
        raise ValueError("`pairs` is empty: no layer with domain adapters has run.")
    return torch.stack(losses).mean()


class GateRecorder:
    """The weights that gates gave.

    Args:
        layers (`Iterable[MixdaLayer]`): Layers with a gate.
        adapter_name (`str`): Whose gates.
    """

    def __init__(self, layers: Iterable[MixdaLayer], adapter_name: str):
        self.gates: dict[str, Any] = {layer.name: layer.cell("gate", adapter_name) for layer in layers}
        self.weights: dict[str, list[torch.Tensor]] = {name: [] for name in self.gates}

    def shares(self, attention_mask: torch.Tensor | None = None) -> dict[str, dict[str, float]]:
        """Mean weight of each enabled domain and of the feed-forward network (`""`), by layer.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 at positions that do not count; for a
                single recorded call.

        Returns:
            `dict[str, dict[str, float]]`
        """
        found = {}
        for name, calls in self.weights.items():
            rows = []
            for weights in calls:
                if attention_mask is not None and weights.shape[:-1] == attention_mask.shape:
                    weights = weights[attention_mask.bool()]
                rows.append(weights.reshape(-1, weights.shape[-1]))
            if rows:
                means = torch.cat(rows).mean(0).tolist()
                found[name] = dict(zip([*self.gates[name].enabled, ""], means, strict=True))
        return found


@contextmanager
def record_gates(model: nn.Module, adapter_name: str | None = None) -> Iterator[GateRecorder]:
    """Records what the gates of an adapter decide in the calls inside the block.

    Args:
        model (`nn.Module`): A model with MixDA adapters.
        adapter_name (`str`, *optional*): Which adapter; the active one if left out.

    Yields:
        [`GateRecorder`]

    Raises:
        ValueError: The model has no such gates.

    Example:
        ```python
        with record_gates(model) as recorder, torch.no_grad():
            model(**inputs)
        recorder.shares(inputs["attention_mask"])  # {"encoder.layer.1.output.dense": {"biology": 0.1, "": 0.9}, ...}
        ```
    """
    layers = [module for module in model.modules() if isinstance(module, MixdaLayer)]
    name = adapter_name or next((layer.active_adapters[0] for layer in layers), "")
    layers = [layer for layer in layers if layer.cell("gate", name) is not None]
    if not layers:
        raise ValueError(f"`model` ({type(model).__name__}) has no gates of an adapter {name!r}.")
    recorder = GateRecorder(layers, name)

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if not in_backward():
                recorder.weights[path].append(output.detach().float())

        return keep

    with _hooked(model, ((gate, hook(path)) for path, gate in recorder.gates.items())):
        yield recorder


@contextmanager
def _hooked(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        # Compiled code ignores hooks that came later.
        with torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()
