"""What some recipes need to see of the dense model on calibration text: router inputs, activations, importances.

Shapes: B batch, S sequence, T tokens, D hidden, I intermediate.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_moe.modes import eval_mode
from hf_moe.routing.steps import target_mask

from .feed_forward import FeedForwardSite, projection_names


__all__ = [
    "LayerStatistics",
    "calibration_batches",
    "capture_inputs",
    "collect_statistics",
    "encode",
    "random_batch",
    "required",
]

#: Tokens of which `router_inputs` and `activations` are kept per layer, at most.
MAX_KEPT_TOKENS = 8192


@dataclass
class LayerStatistics:
    """Statistics of one layer.

    Args:
        router_inputs (`torch.Tensor` of shape `(T, D)`, *optional*): What the feed-forward received, padding excluded.
        activations (`torch.Tensor` of shape `(T, I)`, *optional*): What W_d received, a_c.
        importance (`dict[str, torch.Tensor]`): `"taylor"` mean |a_c dL/da_c|, `"activity"` mean |a_c| and
            `"contribution"` mean |a_c| * ||W_d[:, c]||, each `(I,)`, as far as asked for.
        num_tokens (`int`): Tokens seen.
    """

    router_inputs: torch.Tensor | None = None
    activations: torch.Tensor | None = None
    importance: dict[str, torch.Tensor] = field(default_factory=dict)
    num_tokens: int = 0

    def channels(self, index: torch.Tensor) -> "LayerStatistics":
        """The statistics of some of the channels."""
        return replace(
            self,
            activations=None if self.activations is None else self.activations[:, index],
            importance={name: values[index] for name, values in self.importance.items()},
        )


def required(stats: LayerStatistics | None, name: str, who: Any) -> torch.Tensor:
    """One of the statistics a recipe reads.

    Args:
        stats ([`LayerStatistics`], *optional*): What was collected.
        name (`str`): `"router_inputs"`, `"activations"`, `"taylor"`, `"activity"` or `"contribution"`.
        who: The builder or router start that reads it, for the message.

    Returns:
        `torch.Tensor`

    Raises:
        ValueError: it was not collected.
    """
    found = None
    if stats is not None:
        found = getattr(stats, name) if name in ("router_inputs", "activations") else stats.importance.get(name)
    if found is None:
        raise ValueError(
            f"`{type(who).__name__}` reads the statistics {name!r}, which were not collected: pass `stats` from "
            "`collect_statistics`, or `calibration` to `upcycle`."
        )
    return found


def random_batch(vocab_size: int, seed: int = 0, batch: int = 1, length: int = 128) -> dict[str, torch.Tensor]:
    """Uniformly random token ids, `(B, S)`."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(vocab_size, (batch, length), generator=generator)}


def encode(text: Any, tokenizer: Any, argument: str) -> torch.Tensor:
    """One text or list of token ids -> ids `(1, S)`.

    Raises:
        ValueError: text without a tokenizer, or nothing in it.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(f"`{argument}` has text, which needs `tokenizer`. Pass it, or pass token ids.")
        text = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long)
    ids = ids.reshape(1, -1) if ids.ndim < 2 else ids
    if ids.shape[-1] == 0:
        raise ValueError(f"`{argument}` has an entry without tokens; remove it.")
    return ids


def calibration_batches(calibration: Any, tokenizer: Any = None) -> list[dict[str, torch.Tensor]]:
    """Whatever was passed as `calibration` as a list of model inputs.

    Args:
        calibration: Token ids `(B, S)`, a mapping of model inputs, or an iterable (list, `DataLoader`) of texts, ids
            or mappings. Texts are run one by one, so nothing is padded.
        tokenizer (*optional*): For texts.

    Returns:
        `list[dict[str, torch.Tensor]]`

    Raises:
        ValueError: empty, or text without a tokenizer.
        TypeError: something else.
    """
    if isinstance(calibration, (str, torch.Tensor, Mapping)):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(
            f"`calibration` must be texts, token ids, model inputs or an iterable of them, got "
            f"{type(calibration).__name__}."
        )
    batches = []
    for item in calibration:
        if isinstance(item, Mapping):
            batches.append({k: v for k, v in item.items() if isinstance(v, torch.Tensor)})
        else:
            batches.append({"input_ids": encode(item, tokenizer, "calibration")})
    if not batches:
        raise ValueError("`calibration` is empty; pass at least one text or batch of token ids.")
    return batches


@contextmanager
def capture_inputs(modules: dict[Any, nn.Module], function):
    """While open, calls `function(key, hidden_states)` with what each module receives first."""

    def make(key):
        def hook(module, args, kwargs):
            function(key, args[0] if args else kwargs["hidden_states"])

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            handle = module.register_forward_pre_hook(make(key), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def collect_statistics(
    model: nn.Module,
    sites: list[FeedForwardSite],
    batches: list[dict[str, torch.Tensor]],
    needs: Iterable[str],
) -> dict[int, LayerStatistics]:
    """Runs the dense model over the calibration batches.

    Args:
        model (`nn.Module`): Dense model; its parameters, gradients and modes are the same afterwards.
        sites (`list[FeedForwardSite]`): Layers to watch.
        batches (`list[dict]`): Model inputs; `attention_mask` marks padding.
        needs (`Iterable[str]`): Of `"router_inputs"`, `"activations"`, `"taylor"`, `"activity"`, `"contribution"`.

    Returns:
        `dict[int, LayerStatistics]`: By layer index.

    Raises:
        ValueError: `"taylor"` for a model that returns no loss.
    """
    needs, device = set(needs), next(model.parameters()).device
    observers = {site.layer_idx: _Observer(site, needs) for site in sites}
    with eval_mode(model), ExitStack() as stack:
        for observer in observers.values():
            stack.enter_context(observer)
        for batch in tqdm(batches, desc="Calibrating", disable=len(batches) < 2):
            batch = {k: v.to(device) for k, v in batch.items()}
            for observer in observers.values():
                observer.mask = _mask(batch, model, observer.site)
            if "taylor" in needs:
                _run_with_gradient(model, batch, observers)
            else:
                with torch.no_grad():
                    model(**batch)
    return {layer: observer.result() for layer, observer in observers.items()}


def _mask(batch: dict[str, torch.Tensor], model: nn.Module, site: FeedForwardSite) -> torch.Tensor | None:
    """Which of the tokens that a feed-forward gets are real, `(T,)`; `None` for all."""
    two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    is_target = two_stacks and "decoder" in site.name.split(".")
    mask = batch.get("decoder_attention_mask" if is_target else "attention_mask")
    if mask is None and is_target and "labels" in batch:
        mask = target_mask(batch["labels"])
    return None if mask is None or mask.ndim != 2 else mask.reshape(-1).bool()


def _run_with_gradient(model, batch, observers) -> None:
    inputs = dict(batch)
    if not inputs.keys() & {"labels", "start_positions"}:
        if re.search("For(?!CausalLM|MaskedLM|PreTraining|ConditionalGeneration)", type(model).__name__):
            raise ValueError(
                f'Importances by gradient ("taylor") are those of the loss of {type(model).__name__}, which needs the '
                "labels of its task: pass `calibration` as model inputs with `labels` (`start_positions` and "
                "`end_positions` for question answering)."
            )
        labels = inputs["input_ids"].clone()
        if inputs.get("attention_mask") is not None:
            labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        inputs["labels"] = labels
    try:
        with torch.enable_grad():
            loss = getattr(model(**inputs), "loss", None)
    except TypeError:  # no argument `labels`
        loss = None
    if loss is None:
        raise ValueError(
            f'{type(model).__name__} gives no loss, so importances by gradient ("taylor") cannot be measured; use '
            '"contribution", or a model with a language-modelling head.'
        )
    states = {layer: o.state for layer, o in observers.items() if o.state is not None}
    gradients = torch.autograd.grad(loss, list(states.values()))
    for (layer, state), gradient in zip(states.items(), gradients, strict=True):
        observers[layer].add_importance("taylor", (state.detach() * gradient).abs())
        observers[layer].state = None


class _Observer:
    """Hooks on one feed-forward and its down projection."""

    def __init__(self, site: FeedForwardSite, needs: set[str]):
        self.site, self.needs = site, needs
        names = projection_names(site.module)
        if names is None:
            raise ValueError(f"`{site.name}` ({type(site.module).__name__}) is not a plain feed-forward.")
        self.down = getattr(site.module, names[2])
        self.mask: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        self.kept: dict[str, list[torch.Tensor]] = {"router_inputs": [], "activations": []}
        self.sums: dict[str, torch.Tensor] = {}
        self.num_tokens = 0

    def __enter__(self):
        self.handles = [
            self.site.entry.register_forward_pre_hook(self._on_input, with_kwargs=True),
            self.down.register_forward_pre_hook(self._on_activation),
        ]
        return self

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        return (rows if self.mask is None else rows[self.mask]).float().cpu()

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        missing = MAX_KEPT_TOKENS - sum(map(len, self.kept[name]))
        if name in self.needs and missing > 0:
            self.kept[name].append(self._rows(tensor)[:missing])

    def _on_input(self, module, args, kwargs) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self._keep("router_inputs", states)
        real = states.numel() // states.shape[-1] if self.mask is None else int(self.mask.sum())
        self.num_tokens += real

    def _on_activation(self, module, args):
        state = args[0]
        self._keep("activations", state)
        for name in ("activity", "contribution"):
            if name in self.needs:
                self.add_importance(name, state.abs())
        if "taylor" in self.needs:
            # A frozen model gives no graph at its first layers: start one here.
            state = state if state.requires_grad else state.detach().requires_grad_()
            self.state = state
            return (state, *args[1:])
        return None

    def add_importance(self, name: str, values: torch.Tensor) -> None:
        total = self._rows(values).sum(dim=0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def result(self) -> LayerStatistics:
        importance = {name: total / max(self.num_tokens, 1) for name, total in self.sums.items()}
        if "contribution" in importance:
            weight: torch.Tensor = self.down.weight.detach().float().cpu()
            # `nn.Linear` stores (D, I), GPT-2's `Conv1D` (I, D).
            dim = 0 if isinstance(self.down, nn.Linear) else 1
            importance["contribution"] = importance["contribution"] * weight.norm(dim=dim)
        kept = {name: torch.cat(rows) if rows else None for name, rows in self.kept.items()}
        return LayerStatistics(**kept, importance=importance, num_tokens=self.num_tokens)
