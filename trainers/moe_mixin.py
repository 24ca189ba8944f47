"""The part that makes a Trainer a Mixture-of-Experts trainer."""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_moe.routing import BalanceLosses, GlobalBalanceCallback, RouterScheduleCallback
from hf_moe.routing.load_balancer import validate_balance_options
from hf_moe.views import has_moe_layers, unwrap_model

from .parameter_groups import split_param_groups
from .router_losses import RouterLossCollector


__all__ = ["MoeTrainerMixin"]

if TYPE_CHECKING:  # what it is mixed into has all of this
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class MoeTrainerMixin(_Trainer):
    r"""Goes in front of a Trainer class, which then trains with the router losses of hf_moe.

    What it does, over the class it is mixed into:

    - **Router losses.** Per optimizer step, router_aux_loss_coef * L_balance + router_z_loss_coef * L_z, and what
      routers add themselves (`RouterOutput.penalty`), is added to the loss exactly once, with the statistics of
      `balance_mode` ([`~hf_moe.LoadBalancer`]), padding left out. TRL computes its log-probabilities from the
      decoder's hidden states and never calls the model's own head; its own auxiliary loss, Mixtral's formula over all
      layers pooled, is switched off. So is the one the model's head would add: whichever path a loss takes, the
      trainer adds the router losses, and nobody else does.
    - **Optimizer steps.** The balancers are told the micro-batches and tokens of every step before it starts, the
      shorter last step of an epoch included. The coefficient is therefore independent of gradient accumulation and of
      the number of processes, whatever part of the tokens has labels.
    - **Callbacks.** [`~hf_moe.GlobalBalanceCallback`] is added, and [`~hf_moe.RouterScheduleCallback`] if the model's
      config has schedules or a permutation search, unless they are there already.
      `train(resume_from_checkpoint=...)` finds their state.
    - **Logs.** `aux_loss`, and `router_z_loss` where it is on: unweighted means over the micro-batches of all
      processes since the last log. `aux_loss` is 1 when balanced. `router_penalty` has its coefficient in it.
      `active_experts` is the mean number of experts per token, padding left out. `total_flos` counts, of the experts,
      those that tokens were sent to; transformers counts all.
    - **Optimizer.** `router_learning_rate` and `expert_learning_rate`, see [`MoeTrainingArguments`].

    Evaluation losses hold no router losses, as in the model's own forward.

    The Mixture-of-Experts models of transformers are trained alike, with the balance loss in place of their own.
    Their coefficient then weighs a loss that is 1/K of theirs (1 instead of K when balanced), once per step and not
    once per micro-batch and process.

    Note: a TRL trainer sets `config.output_router_logits` in stock use; here it is set to `False`, as it is for models
    of transformers, because an auxiliary loss is computed elsewhere whenever it is `True`.

    Raises:
        ValueError: the model has no MoE layer; `nn.DataParallel` would be used; an argument is out of range;
            selection biases are to be trained beside an adapter that would not keep them; or, in training, no router
            ran with gradients.

    Example:

    ```python
    >>> from trl import KTOTrainer
    >>> from hf_moe.trainers import MoeTrainerMixin
    >>> class MoeKTOTrainer(MoeTrainerMixin, KTOTrainer):
    ...     pass
    ```
    """

    model: Any
    #: Whether a model without MoE layers is trained too, as the class below would: for methods with dense stages.
    allows_dense = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which a single process uses when it sees "
                f"several GPUs ({self.args.n_gpu}). Launch it with `accelerate launch`, or make one GPU visible."
            )
        self._router_losses: RouterLossCollector | None = None
        self._router_metrics: dict[str, tuple[torch.Tensor, int]] = {}
        self._expert_parameters: torch.Tensor | None = None
        self._is_dense = self.allows_dense and not has_moe_layers(self._moe_model)
        if self._is_dense:
            return
        config = _router_config(self._prepare_router_losses().model)
        self._balance = self._callback(GlobalBalanceCallback)
        options = getattr(config, "router_config", {})
        if options.get("schedules") or options.get("permutation_search"):
            self._callback(RouterScheduleCallback)

    def _callback(self, cls: type) -> Any:
        """The trainer's callback of this class, added if there is none."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, cls):
                return callback
        callback = cls()
        self.add_callback(callback)
        return callback

    # -- router losses -------------------------------------------------------------------------------------------
    @property
    def _moe_model(self) -> nn.Module:
        return unwrap_model(self.accelerator.unwrap_model(self.model))

    def _prepare_router_losses(self) -> RouterLossCollector:
        """The collector of the model as it is now: `model_init` makes a new one for every run."""
        model = self._moe_model
        if self._router_losses is None or self._router_losses.model is not model:
            self._router_losses = RouterLossCollector(model)
            self._configure(self._router_losses)
            self._check_selection_biases(self._router_losses)
        return self._router_losses

    def _configure(self, collector: RouterLossCollector) -> None:
        """Writes what the arguments say about router losses into the model's config, and switches off all others."""
        config = _router_config(collector.model)
        if hasattr(self, "aux_loss_enabled"):  # a TRL trainer
            config.output_router_logits = self.aux_loss_enabled = False
            reference = getattr(self, "ref_model", None)
            if reference is not None:  # TRL would compute one for it as well, and drop it
                _router_config(unwrap_model(self.accelerator.unwrap_model(reference))).output_router_logits = False
        elif collector.views:
            config.output_router_logits = False
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "balance_mode"):
            value = getattr(self.args, name, None)
            if value is not None:
                setattr(config, name, value)
        for name, value in _coefficients(config).items():
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        mode = getattr(config, "balance_mode", "micro")
        validate_balance_options(mode)
        for balancer, _ in collector.balancers.values():
            balancer.mode = mode
            balancer.z_loss = _coefficients(config)["router_z_loss_coef"] > 0

    def _check_selection_biases(self, collector: RouterLossCollector) -> None:
        adapter = getattr(self.accelerator.unwrap_model(self.model), "peft_config", None)
        for name, (balancer, routers) in collector.balancers.items():
            if not adapter or balancer.bias_update_speed == 0:
                continue
            modules = {id(module): path for path, module in collector.model.named_modules()}
            if any("modules_to_save" not in modules[id(router)] for router in routers):
                raise ValueError(
                    f"`router_bias_update_speed={balancer.bias_update_speed}` moves buffers of the routers "
                    f"({name!r}), which a checkpoint of this adapter would not hold. Add the routers to the adapter, "
                    '`LoraConfig(modules_to_save=["gate"])`, or set `router_bias_update_speed=0.0`.'
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of the class below plus, in training, the router losses of its decoder passes with gradients."""
        if self._is_dense:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        collector = self._prepare_router_losses()
        config = _router_config(collector.model)
        coefficients = tuple(_coefficients(config).values())
        wanted = (
            any(coefficients)
            or getattr(config, "has_router_penalty", False)
            or any(b.bias_update_speed for b, _ in collector.balancers.values())
        )
        if not (self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with collector.collect(losses=bool(wanted)) as pending:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not wanted:
            return result
        if not pending:
            raise ValueError(
                "no router of the model ran with gradients, so its router losses would silently be missing. Reentrant "
                "checkpointing does that: use `activation_checkpointing_kwargs={'use_reentrant': False}`. To train "
                "without router losses, set `router_aux_loss_coef` and `router_z_loss_coef` to 0."
            )
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        # The balancer's scale is right for a loss that the Trainer goes on to sum or to average itself. Where losses
        # are summed, the class below has already undone the mean over ranks, so what is added here has to as well.
        is_summed = self._loss_is_summed(num_items_in_batch)
        factor = self._rank_factor(is_summed)
        for part in pending:
            losses = part.finish(num_items_in_batch=1 if is_summed else None)
            total = factor * losses.total(*coefficients)
            loss = loss + total.to(loss.device)
            self._note(losses)
        return (loss, outputs) if return_outputs else loss

    def _rank_factor(self, is_summed: bool) -> int:
        over_ranks = self.accelerator.num_processes // self.get_tp_size()
        return over_ranks if is_summed and self.args.average_tokens_across_devices else 1

    def _token_mean_scale(
        self, num_tokens: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """What to multiply a mean over the tokens of a micro-batch with, so that the step's loss holds the mean over
        all its tokens, as it does of the router losses."""
        is_summed = self._loss_is_summed(num_items_in_batch)
        balancer, _ = next(iter(self._prepare_router_losses().balancers.values()))
        scale = balancer._scale(num_tokens, num_items_in_batch=1 if is_summed else None)
        return self._rank_factor(is_summed) * scale

    def _loss_is_summed(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `training_step` sums what `compute_loss` returns over micro-batches instead of averaging it."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    # -- optimizer steps -----------------------------------------------------------------------------------------
    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        """As in the class below; the balancers learn how many micro-batches and tokens the step will have."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if not self._is_dense and all(
            len(batch) for batch in batches
        ):  # the Trainer will say what is wrong with an empty one
            self._balance.observe_batches(batches, replicas=self.get_cp_size() * self.get_sp_size())
        return batches, num_items_in_batch

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in the class below; the router state is looked for in the same checkpoint."""
        if isinstance(resume_from_checkpoint, str | os.PathLike) and not self._is_dense:
            self._balance.resume_from_checkpoint = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # -- checkpoints of transformers' own models -----------------------------------------------------------------
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is not None or not self._load_converted(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_converted(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_converted(self, folder: str | None) -> bool:
        """Loads a checkpoint through `from_pretrained`, where the Trainer would leave the experts as they are: it
        saves them one by one, as published checkpoints have them, and looks for stacked ones (transformers, issue
        48805). Returns whether it did; models of hf_moe are saved as they are."""
        is_bare = isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if folder is None or not is_bare or self._is_dense or not self._prepare_router_losses().views:
            return False
        loaded = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())
        return True

    # -- optimizer -----------------------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in the class below, with learning rates of their own for routers and experts where the arguments have
        them."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        names = ("router_learning_rate", "expert_learning_rate")
        rates = {name: getattr(self.args, name, None) for name in names}
        if is_new and any(rate is not None for rate in rates.values()):
            split_param_groups(optimizer, self.model if model is None else model, **rates)
        return optimizer

    # -- cost ----------------------------------------------------------------------------------------------------
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in the class below, 6 operations per parameter and token, but of the experts only those in use."""
        if self._is_dense:
            return super().floating_point_ops(inputs)
        meter, total = self._prepare_router_losses().activity, super().floating_point_ops(inputs)
        counted, parameters = meter.num_passes > 0, meter.take_parameters()
        if not total or not counted or parameters is None:
            return total
        self._expert_parameters = parameters + (0 if self._expert_parameters is None else self._expert_parameters)
        tokens = inputs[getattr(self.model, "main_input_name", "input_ids")].numel()
        return total - 6 * tokens * meter.num_routed

    def store_flos(self) -> None:
        """As in the class below; experts are added here, because their number is on the device until now."""
        if self._expert_parameters is not None:
            self.current_flos += 6.0 * self._expert_parameters.item()
            self._expert_parameters = None
        super().store_flos()

    # -- logs ----------------------------------------------------------------------------------------------------
    def _note(self, losses: BalanceLosses) -> None:
        self._note_metric("aux_loss", losses.aux_loss)
        self._note_metric("router_z_loss", losses.z_loss)
        self._note_metric("router_penalty", losses.penalty)

    def _note_metric(self, name: str, value: torch.Tensor | None) -> None:
        """Has the mean of `value` over micro-batches and processes in the next log."""
        if value is not None:
            total, count = self._router_metrics.get(name, (0.0, 0))
            self._router_metrics[name] = (total + value.detach(), count + 1)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in the class below, with the router losses of the micro-batches since the last log."""
        if self.model.training and self._router_metrics:
            means = torch.stack([total / count for total, count in self._router_metrics.values()])
            means: Any = self.accelerator.reduce(means, "mean")
            logs.update(zip(self._router_metrics, means.tolist(), strict=True))
            self._router_metrics.clear()
        counting = self.model.training and not self._is_dense
        counts = self._prepare_router_losses().activity.drain_means() if counting else None
        if counts is not None:
            counts: Any = self.accelerator.reduce(counts, "sum")
            logs["active_experts"] = (counts[0] / counts[1].clamp(min=1)).item()
        super().log(logs, *args, **kwargs)


def _router_config(model: Any) -> Any:
    """Where the fields of `MoeConfigMixin` are: in the text part of a composite config."""
    return model.config.get_text_config()


def _coefficients(config: Any) -> dict[str, float]:
    """Weights of balance loss and z-loss, as the config says now."""
    return {name: getattr(config, name, 0.0) for name in ("router_aux_loss_coef", "router_z_loss_coef")}
