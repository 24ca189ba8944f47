"""Trains a Read-ME model by turns: its router on routing distillation, its experts on the language-model loss.

Shapes: B batch, S sequence, T real tokens, N experts, I channels of the dense feed-forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_moe.routing.loss_scale import balance_loss_scale
from hf_moe.upcycling.feed_forward import locate_feed_forwards
from hf_moe.upcycling.statistics import capture_inputs
from hf_moe.views import unwrap_model

from .read_me_config import ReadMeTrainingArguments
from .read_me_targets import bucketed_overlap, distillation_loss, mask_overlap


__all__ = ["ReadMeTrainer"]

# What the router reads of a batch.
ROUTER_INPUTS = ("input_ids", "attention_mask", "position_ids")


class ReadMeTrainer(Trainer):
    r"""Alternates router steps and expert steps (Read-ME, 2410.19123, Sec. 3).

    *Router steps* minimise L_RD = sum over layers of KL(softmax(G) || softmax(o)), where o_j counts how many of the
    channels that a token uses most in the dense model are in expert j. *Expert steps* minimise the language-model
    loss with the router as it is; the argmax gives it no gradient. Both are steps of one optimizer with two learning
    rates, so that a checkpoint in the middle of a round resumes exactly. Evaluation is by the language-model loss.

    Logs beside `loss`: `round`, and `router_loss` (per token and layer) with `router_agreement` (share of tokens and
    layers whose most overlapping expert the router chose), or `lm_loss`, of the steps since the last log.

    Note: released is a script per stage, each with an optimizer of its own; moments are kept between rounds here.

    Args:
        model ([`~hf_moe.ReadMeForCausalLM`]): From [`~hf_moe.upcycling.convert_to_readme`]; PEFT on it too.
        args ([`ReadMeTrainingArguments`]): Configuration of the run.
        teacher (`PreTrainedModel`, *optional*): The dense model it was made from; not needed without router steps.
        **kwargs: As in [`~transformers.Trainer`].

    Raises:
        ValueError: the model was not converted, or the teacher does not fit it.

    Example:

    ```python
    >>> from hf_moe.trainers import ReadMeTrainer, ReadMeTrainingArguments
    >>> model, report = convert_to_readme(dense, domains)
    >>> trainer = ReadMeTrainer(model, ReadMeTrainingArguments("out"), teacher=dense, train_dataset=rows)
    >>> trainer.train()
    ```
    """

    args: ReadMeTrainingArguments
    model: Any

    def __init__(
        self,
        model: Any = None,
        args: ReadMeTrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        **kwargs,
    ):
        args = ReadMeTrainingArguments("trainer_output") if args is None else args
        layers = _routed_layers(model)
        if args.router_steps:
            if not any(parameter.requires_grad for parameter in _decoder(model).router.parameters()):
                raise ValueError(
                    "The router of `model` is frozen, so router steps would train nothing. With PEFT, add "
                    '`modules_to_save=["router"]`; or set `router_steps=0`.'
                )
            self._projections = _down_projections(teacher, model, layers)
        if args.trained_parts == "feed_forward":
            for name, parameter in model.named_parameters():
                if not any(part in name for part in (".mlp.", "norm.", ".router.", "lora_")):
                    parameter.requires_grad_(False)
        super().__init__(model, args, **kwargs)
        self.teacher: Any = teacher
        if teacher is not None:
            self.teacher.to(self.args.device)
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}

    # -- losses --------------------------------------------------------------------------------------------------
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """L_RD in router steps; the language-model loss in expert steps and in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.schedule.stage(self.state.global_step).part == "router":
            return self._router_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._note("lm_loss", self._per_batch(loss, inputs, num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    def _router_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        seen = {name: inputs[name] for name in ROUTER_INPUTS if inputs.get(name) is not None}
        mask = seen.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"`attention_mask` must be (batch, sequence) to train the router, got {mask.dim()}-D.")
        real = torch.ones_like(seen["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
        real = real.reshape(-1)
        overlaps = self._overlaps(seen, real)
        outputs = model(**seen, routing_only=True)
        logits = outputs.router_logits.flatten(0, 1)[real]  # (T, N)
        per_token = distillation_loss(logits, overlaps, self.args.distill_target, self.args.target_temperature)
        mean = per_token.mean()
        chosen = logits.detach().argmax(-1)
        agreement = torch.stack([(overlap.argmax(-1) == chosen).float().mean() for overlap in overlaps]).mean()
        self._note("router_loss", mean.detach() / len(overlaps))
        self._note("router_agreement", agreement)
        labels = inputs.get("labels")
        scale = balance_loss_scale(real.sum(), labels=labels, num_items_in_batch=num_items_in_batch)
        loss = mean * scale * self._ranks(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _overlaps(self, inputs: dict[str, torch.Tensor], real: torch.Tensor) -> list[torch.Tensor]:
        """o of every layer that has a choice, `(T, N)` each, from one pass of the dense model."""
        layers = _decoder(self.model).layers
        function = mask_overlap if self.args.distill_target == "overlap" else bucketed_overlap
        found: dict[int, torch.Tensor] = {}

        def keep(layer: int, state: torch.Tensor) -> None:
            tokens = state.flatten(0, -2)[real]  # (T, I)
            found[layer] = function(tokens, layers[layer].mlp.channel_masks).to(real.device)

        was_training = self.teacher.training
        self.teacher.eval()
        with capture_inputs(self._projections, keep):
            self.teacher.base_model(**inputs, use_cache=False)
        self.teacher.train(was_training)
        return [found[layer] for layer in self._projections]

    def _ranks(self, num_items_in_batch: Any) -> int:
        """The Trainer averages gradients over ranks; where losses are sums over the step, this undoes it."""
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if not (summed and self.args.average_tokens_across_devices):
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _per_batch(self, loss: torch.Tensor, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """The micro-batch's own mean of a loss that is its share of the step's."""
        labels = inputs.get("labels")
        if num_items_in_batch is None or labels is None:
            return loss.detach()
        own = labels[..., 1:].ne(-100).sum().clamp(min=1)
        return loss.detach() / self._ranks(num_items_in_batch) * num_items_in_batch / own

    # -- optimizer -----------------------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in [`~transformers.Trainer`], with groups of their own for the router."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            router = {id(p) for p in _decoder(self.model if model is None else model).router.parameters()}
            old = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for part, rate in (("experts", self.args.learning_rate), ("router", self.args.router_learning_rate)):
                for group in old:
                    params = [p for p in group["params"] if (id(p) in router) == (part == "router")]
                    if params:
                        optimizer.add_param_group({**group, "params": params, "lr": rate, "part": part})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule of [`ReadMeSchedule`], a factor per group."""
        if self.lr_scheduler is None:
            groups: Any = self.optimizer if optimizer is None else optimizer

            def of(part: str) -> Callable[[int], float]:
                return lambda step: self.args.schedule.factor(step, part)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                groups, [of(group.get("part", "experts")) for group in groups.param_groups]
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- logs ----------------------------------------------------------------------------------------------------
    def _note(self, name: str, value: torch.Tensor) -> None:
        total, count = self._sums.get(name, (torch.zeros((), device=value.device), 0))
        self._sums[name] = total + value, count + 1

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in [`~transformers.Trainer`], with what was noted since the last log."""
        if self._sums and "loss" in logs:
            means: Any = torch.stack([total / count for total, count in self._sums.values()])
            means = self.accelerator.reduce(means, "mean")
            logs |= dict(zip(self._sums, means.tolist(), strict=True))
            logs["round"] = self.args.schedule.stage(max(self.state.global_step - 1, 0)).round
            self._sums.clear()
        super().log(logs, *args, **kwargs)


def _decoder(model: Any) -> Any:
    return unwrap_model(model).base_model


def _routed_layers(model: Any) -> list[int]:
    """Layers whose experts differ."""
    layers = getattr(_decoder(model), "layers", ()) if isinstance(unwrap_model(model), PreTrainedModel) else ()
    found = {i: layer.mlp.channel_masks for i, layer in enumerate(layers) if hasattr(layer.mlp, "channel_masks")}
    if not found:
        raise ValueError(
            f"`model` must be a `ReadMeForCausalLM`, got {type(model).__name__}. Make one of a dense model with "
            "`hf_moe.convert_to_readme`."
        )
    if not all(bool(masks.any(dim=-1).all()) for masks in found.values()):
        raise ValueError(
            "`model` does not know which channels of the dense model its experts have (`mlp.channel_masks`): it was "
            "not made by `hf_moe.convert_to_readme`."
        )
    return [i for i, masks in found.items() if not bool((masks == masks[0]).all())]


def _down_projections(teacher: Any, model: Any, layers: list[int]) -> dict[int, nn.Module]:
    """What the channels of the dense model flow into, by layer."""
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"`teacher` must be the dense model that was converted, got {type(teacher).__name__}: router steps look "
            "at the channels it uses. Pass it, or set `router_steps=0`."
        )
    if not layers:
        raise ValueError(
            "All experts of `model` keep the same channels, so there is nothing to route. Convert with a smaller "
            "`keep`, or set `router_steps=0`."
        )
    found: dict[int, Any] = {site.layer_idx: site.module for site in locate_feed_forwards(teacher)}
    expected = _decoder(model).config.intermediate_size
    for layer in layers:
        width = found[layer].down_proj.weight.shape[-1] if layer in found else 0
        if width != expected:
            raise ValueError(
                f"`teacher` ({type(teacher).__name__}) has {width} channels in layer {layer}, but `model` was made "
                f"from a model with {expected}. Pass the model that was converted."
            )
    return {layer: found[layer].down_proj for layer in layers}
