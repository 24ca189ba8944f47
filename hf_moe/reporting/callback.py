"""Watching the experts while a Trainer trains.

Shapes: B batch, S sequence, T = B * S tokens, L MoE layers, N experts, K per token.
"""

from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from hf_moe.routing.layer_routing import LayerRouting
from hf_moe.routing.output import RoutingContext
from hf_moe.routing.statistics import RouterStats
from hf_moe.views import MoeLayerView, Routing, in_backward, moe_layers, unwrap_model

from .drawing import evenly_spaced


__all__ = ["ExpertLoadCallback", "TrainingRecorder"]

logger = logging.get_logger(__name__)


class ExpertLoadCallback(TrainerCallback):
    """Adds routing statistics of the training batches since the last log to the Trainer's logs.

    The number of keys does not depend on the size of the model:

    | key | meaning |
    |---|---|
    | `routing/max_violation`, `..._worst_layer` | load of the busiest expert over the mean load, minus 1 |
    | `routing/entropy` | entropy of the router's distribution, mean over tokens, in nats |
    | `routing/load_entropy` | entropy of the expert load; ln N is even |
    | `routing/dead_share` | share of experts without any token |
    | `routing/active_experts` | experts per token |
    | `routing/layer_<i>/max_violation`, `.../entropy` | for `per_layer` evenly spaced layers |

    All but the last two are means over layers. Counted are the tokens that are not padding, of all processes, in
    forward passes with gradients: neither reference models nor evaluation, and activation checkpointing's second run
    of a layer only once. Reentrant checkpointing cannot be watched, which is said at the first log.

    A Trainer asks TensorBoard, W&B and the like before the callbacks passed to it. `callbacks=[ExpertLoadCallback()]`
    therefore reaches the console and `trainer.state.log_history` only; [`attach`] puts the callback in front.

    Args:
        per_layer (`int`, defaults to 0): Layers to log one by one.

    Raises:
        ValueError: `per_layer` is negative; or, when training begins, the model has no MoE layer.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=dataset)
        ExpertLoadCallback(per_layer=4).attach(trainer)
        trainer.train()
        ```
    """

    def __init__(self, per_layer: int = 0):
        if per_layer < 0:
            raise ValueError(f"`per_layer` must be 0 or more, got {per_layer}.")
        self.per_layer = per_layer
        self.recorder: TrainingRecorder | None = None

    def attach(self, trainer: Any) -> "ExpertLoadCallback":
        """Puts the callback before all others of `trainer`, so that every logger sees its numbers.

        Args:
            trainer (`Trainer`): Any Trainer, before `train()`.

        Returns:
            [`ExpertLoadCallback`]: itself.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        self._close()  # of a run that ended in an exception
        self.recorder = TrainingRecorder(model)

    def on_train_end(self, args, state, control, **kwargs):
        self._close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Evaluations and the summary at the end are logged too, and have no `loss`.
        if self.recorder is None or logs is None or "loss" not in logs:
            return
        values = self.recorder.drain(self.per_layer)
        if not values:
            logger.warning_once(
                "ExpertLoadCallback saw no routing in training. With reentrant activation checkpointing routers only "
                "run without gradients; set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
            return
        logs.update(values)
        # The history got its copy of the logs before the callbacks did.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None


class TrainingRecorder:
    """Hooks on a model's routers that feed [`~hf_moe.routing.RouterStats`] during training steps.

    Args:
        model (`nn.Module`): Accepted by [`~hf_moe.moe_layers`].

    Example:
        ```python
        recorder = TrainingRecorder(model)  # for a training loop without a Trainer
        for batch in loader:
            train_step(model, batch)
        logger.info(recorder.drain())
        recorder.close()
        ```
    """

    def __init__(self, model: nn.Module):
        inner = unwrap_model(model)
        self.views = moe_layers(inner)
        self.stats = RouterStats()
        self._pending: dict[int, Routing] = {}
        self._masks: dict[int, torch.Tensor | None] = {}
        self._token_mask: torch.Tensor | None = None
        self._handles = [inner.base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        for view in self.views:
            self._handles.append(view.router.register_forward_hook(self._hook(view)))

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def drain(self, per_layer: int = 0) -> dict[str, float]:
        """What was seen since the last call, over all processes; every process must call it.

        Args:
            per_layer (`int`, defaults to 0): Layers to give one by one.

        Returns:
            `dict`: Empty where nothing was seen.
        """
        if not self.stats.num_experts:
            return {}
        summary = self.stats.reduce().compute()
        self.stats.reset()
        values = {f"routing/{key}": value for key, value in summary.scalars().items()}
        for row in evenly_spaced(len(self.views), per_layer):
            values[f"routing/layer_{row}/max_violation"] = summary.max_violation[row].item()
            values[f"routing/layer_{row}/entropy"] = summary.entropy[row].item()
        return values

    def _before_forward(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._pending.clear()  # of a forward that did not reach its last layer
        mask = kwargs.get("attention_mask")
        self._token_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def _hook(self, view: MoeLayerView):
        # Never traced: what is compiled is the model, not the bookkeeping.
        @torch.compiler.disable
        def hook(module: nn.Module, _args: tuple, output: Any) -> None:
            if not (module.training and torch.is_grad_enabled()) or in_backward():
                return
            self._masks[view.index] = next((a.token_mask for a in _args if isinstance(a, RoutingContext)), None)
            self._pending[view.index] = Routing(*(tensor.detach() for tensor in view.read(output)))
            if len(self._pending) == len(self.views):
                self._update()

        return hook

    def _update(self) -> None:
        device = self._pending[0].router_logits.device
        layers = [
            LayerRouting(
                self._pending[view.index].router_logits.to(device),
                self._pending[view.index].top_k_index.to(device),
                view.probabilities,
            )
            for view in self.views
        ]
        self._pending.clear()
        # Our routers are told which tokens are real. To others the model's mask applies, unless it describes something
        # else, such as text without the image tokens beside it.
        masks = [self._masks.pop(view.index, None) for view in self.views]
        whole = self._token_mask
        for i, layer in enumerate(layers):
            if masks[i] is None and whole is not None and whole.numel() == layer.index.shape[0]:
                masks[i] = whole
        self.stats.update(layers, [None if mask is None else mask.to(device) for mask in masks])
