"""Trains MixDA: knowledge into domain adapters first, then gate, task adapter and head on labels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_moe.adapters.mixda import MixdaLayer, record_knowledge

from .mixda_collators import MixdaPromptCollator, MixdaTextCollator
from .mixda_config import MixdaTrainingArguments
from .mixda_general import GeneralText


__all__ = ["MixdaTrainer"]

logger = logging.get_logger(__name__)


class MixdaTrainer(Trainer):
    r"""[`~transformers.Trainer`] for both stages of MixDA (https://huggingface.co/papers/2306.05406).

    With `stage="knowledge"` in the adapter's config the loss is L = lambda * L_K + L_S. L_K is the model's own loss on
    the domain: masked (or next) tokens, or the facts of prompts. L_S is what keeps the adapter from forgetting:
    $\frac{1}{L} \sum_l \lVert F_l - K_l \rVert^2$ on a batch of ordinary text that is drawn together with the
    domain's. That text runs without gradients and dropout, up to the last domain adapter; only domain adapters get
    gradients of L_S.

    With `stage="task"` the loss is the model's own, and gate, task adapter and head train.

    An epoch is one pass over `train_dataset`; the ordinary text starts over when it ends, and a resumed run goes on
    with the rows it would have had. Evaluation losses are the model's own in both stages.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With a [`~hf_moe.MixdaConfig`] adapter, which is the active one.
        args ([`MixdaTrainingArguments`], *optional*): Configuration of the run.
        *trainer_args: As in [`~transformers.Trainer`].
        general_dataset (*optional*): Rows of ordinary text, `{"text": ...}` or tokenised, with a length. Without it
            the first stage has no L_S.
        general_collator (`Callable`, *optional*): Makes batches of it; they need no labels.
        **kwargs: As in [`~transformers.Trainer`]. Without `data_collator`, the first stage uses
            [`MixdaPromptCollator`] for rows with `prompt` and [`MixdaTextCollator`] otherwise; both need
            `processing_class`, a tokenizer.

    Raises:
        ValueError: The model has no MixDA adapter, or has no domains to train; ordinary text is given for the second
            stage.
        TypeError: `args` or `general_dataset` are of a type that cannot be used.

    Example:

    ```python
    >>> model = peft.get_peft_model(masked_lm, hf_moe.MixdaConfig(domains=["biology"]))
    >>> trainer = MixdaTrainer(
    ...     model, MixdaTrainingArguments("out"), train_dataset=[{"text": "Aspirin inhibits cyclooxygenase."}],
    ...     general_dataset=[{"text": "The boats come home with the tide."}], processing_class=tokenizer,
    ... )
    >>> trainer.train()
    >>> model.save_pretrained("biology")
    ```
    """

    model: Any
    args: Any

    def __init__(
        self,
        model: Any = None,
        args: MixdaTrainingArguments | None = None,
        *trainer_args: Any,
        general_dataset: Any = None,
        general_collator: Callable | None = None,
        **kwargs: Any,
    ):
        args = MixdaTrainingArguments("trainer_output") if args is None else args
        if not isinstance(args, MixdaTrainingArguments):
            raise TypeError(f"`args` must be MixdaTrainingArguments, got {type(args).__name__}.")
        if model is None:
            raise ValueError("`model` must be given: an adapted model cannot be made by `model_init`.")
        stage = _stage(model)
        self._knowledge = stage == "knowledge"
        if general_dataset is not None and not self._knowledge:
            raise ValueError(
                f"`general_dataset` is for `stage='knowledge'`, but the adapter's stage is {stage!r}, which has no "
                "sampling loss. Leave it out."
            )
        tokenizer = kwargs.get("processing_class")
        if self._knowledge and not trainer_args and kwargs.get("data_collator") is None and tokenizer is not None:
            kwargs["data_collator"] = _collator(model, tokenizer, kwargs.get("train_dataset"), args.max_length)
        super().__init__(model, args, *trainer_args, **kwargs)
        self._general: GeneralText | None = None
        self._metrics: dict[str, tuple[float | torch.Tensor, int]] = {}
        if general_dataset is not None:
            if general_collator is None:
                if tokenizer is None:
                    raise ValueError("`general_collator` or `processing_class` must be given with `general_dataset`.")
                general_collator = MixdaTextCollator(tokenizer, None, args.max_length)
            self._general = GeneralText(general_dataset, general_collator, seed=args.seed)
        elif self._knowledge:
            logger.warning("Without `general_dataset` there is no sampling loss: the domain adapter may forget.")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._knowledge and self._signature_columns is not None:  # what the collators read
            self._signature_columns += ["text", "prompt", "targets", "special_tokens_mask"]

    # -- loss ----------------------------------------------------------------------------------------------------
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The model's loss; in training in the first stage, lambda * L_K + L_S."""
        if not (self._knowledge and model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # First, so that nothing lies between the other forward call and its backward pass.
        sampling = None if self._general is None else self._sampling_loss(model, self._general)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        knowledge, outputs = result if isinstance(result, tuple) else (result, None)
        loss = self.args.lambda_knowledge * knowledge
        steps = self.current_gradient_accumulation_steps if self._loss_is_summed(num_items_in_batch) else 1
        self._note("knowledge_loss", knowledge.detach() * steps)
        if sampling is not None:
            # A mean over the micro-batches of a step, whether the Trainer sums its losses or averages them.
            loss = loss + sampling / steps
            self._note("sampling_loss", sampling.detach())
        return (loss, outputs) if return_outputs else loss

    def _sampling_loss(self, model: nn.Module, general: GeneralText) -> torch.Tensor:
        plain = self.accelerator.unwrap_model(model)
        rows = self.args.general_batch_size or self.args.per_device_train_batch_size
        step = self.state.global_step * self.args.gradient_accumulation_steps + self._micro_step()
        batch = general.batch(rows, step * self.args.world_size + self.args.process_index)
        batch = self._prepare_inputs(batch)
        plain.eval()
        try:
            with record_knowledge(plain, stop=True) as recorder, torch.no_grad():
                plain(**batch)
        finally:
            plain.train()
        return recorder.loss(batch.get("attention_mask"), self.args.sampling_reduction)

    def _micro_step(self) -> int:
        """How many micro-batches of this optimizer step there have been."""
        if getattr(self, "_counted_step", None) != self.state.global_step:
            self._counted_step, self._micro_steps = self.state.global_step, -1
        self._micro_steps += 1
        return self._micro_steps

    def _loss_is_summed(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    # -- optimizer -----------------------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in the class below, with a learning rate of their own for the gates."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.gate_learning_rate
        if is_new and rate is not None:
            modules = (self.model if model is None else model).modules()
            layers = [module for module in modules if isinstance(module, MixdaLayer)]
            gates = {p for layer in layers for p in getattr(layer, f"{layer.prefix}gate").parameters()}
            old = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for own, learning_rate in ((False, None), (True, rate)):
                for group in old:
                    params = [p for p in group["params"] if (p in gates) == own]
                    if params:
                        lr = group["lr"] if learning_rate is None else learning_rate
                        optimizer.add_param_group({**group, "params": params, "lr": lr})
        return optimizer

    # -- logs ----------------------------------------------------------------------------------------------------
    def _note(self, name: str, value: torch.Tensor) -> None:
        total, count = self._metrics.get(name, (0.0, 0))
        self._metrics[name] = (total + value, count + 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the class below, with L_K and L_S since the last log."""
        if "loss" in logs and self._metrics:
            values: Any = torch.stack([torch.as_tensor(total / count) for total, count in self._metrics.values()])
            means: Any = self.accelerator.reduce(values, "mean")
            logs.update(zip(self._metrics, means.tolist(), strict=True))
            self._metrics.clear()
        super().log(logs, *args, **kwargs)


def _stage(model: Any) -> str:
    """The stage of the active MixDA adapter.

    Raises:
        ValueError: There is none.
    """
    for module in model.modules():
        if isinstance(module, MixdaLayer):
            for name in module.active_adapters:
                config = model.peft_config.get(name)
                if config is not None and module.has(name):
                    if config.stage == "knowledge" and not config.in_use:
                        raise ValueError(
                            f"The adapter {name!r} has no domain in use, so its stage 'knowledge' trains nothing. "
                            "Enable one with `set_domains`, or use `stage='task'`."
                        )
                    return config.stage
    raise ValueError(
        f"`model` ({type(model).__name__}) has no active MixDA adapter. Add one: "
        "`peft.get_peft_model(model, hf_moe.MixdaConfig(...))`."
    )


def _collator(model: Any, tokenizer: Any, dataset: Any, max_length: int | None) -> Callable:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    objective = "causal" if base.can_generate() else "masked"
    first = next(iter(dataset), {}) if dataset is not None else {}
    if "prompt" in first:
        return MixdaPromptCollator(tokenizer, objective, max_length)
    return MixdaTextCollator(tokenizer, objective, max_length)
