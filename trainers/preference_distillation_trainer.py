"""Preference distillation: a student learns answers a teacher prefers, with the teacher as the reference."""

from typing import Any

import torch
from torch import nn

from hf_moe.views import unwrap_model

from .dpo_trainer import MoeDPOTrainer
from .preference_distillation_config import PreferenceDistillationConfig
from .reference_columns import REFERENCE_COLUMNS, WithReference, add_reference_columns
from .teachers import OnDevice, check_teacher, load_teacher


__all__ = ["PreferenceDistillationTrainer", "kto_pair_loss"]


def kto_pair_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    r"""For the log-ratios d = log pi - log pi_ref of P pairs, with k = max(0, mean d) of each side as a constant,

        1 - sigmoid(beta (d_chosen - k_rejected))   and   1 - sigmoid(beta (k_chosen - d_rejected)).

    Args:
        chosen, rejected (`torch.Tensor` of shape `(P,)`): Log-ratios.
        beta (`float`): Scale.

    Returns:
        `torch.Tensor` of shape `(2 P,)`: Losses of the chosen and then of the rejected answers.

    Example:

    ```python
    >>> kto_pair_loss(torch.zeros(1), torch.zeros(1), beta=0.1)
    tensor([0.5000, 0.5000])
    ```
    """
    k_chosen, k_rejected = (d.detach().mean().clamp(min=0) for d in (chosen, rejected))
    good = 1 - torch.sigmoid(beta * (chosen - k_rejected))
    bad = 1 - torch.sigmoid(beta * (k_chosen - rejected))
    return torch.cat([good, bad])


class PreferenceDistillationTrainer(MoeDPOTrainer):
    r"""Preference distillation of [LLaVA-MoD](https://huggingface.co/papers/2408.15881), Sec. 3.3: [`~trl.DPOTrainer`]
    with the teacher as the reference, plus the router losses of [`MoeTrainerMixin`] where the student has routers.

    Log-probabilities of the teacher are sums over the answer, so its architecture is free; it reads the same batch and
    therefore needs the same tokens and the same number of tokens for an image. With `precompute_ref_log_probs=True`
    they are computed once before training, of data with images too, and the teacher then leaves the device. Since the
    reference is not a copy of the student, margins are far from 0 at the start.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The student, dense or a Mixture-of-Experts.
        teacher_model (`str` or `PreTrainedModel`, *optional*): The teacher; that of `args` by default.
        args ([`PreferenceDistillationConfig`], *optional*): Configuration; `loss_type=["kto_pair"]` for the loss of
            the released code ([`kto_pair_loss`]).
        **kwargs: As in [`~trl.DPOTrainer`], but for `ref_model`.

    Raises:
        ValueError: teacher and student do not fit, `ref_model` was given, or the teacher shall run on a device of its
            own while FSDP or DeepSpeed shards it.
        TypeError: `args` is of another class, or `teacher_model` is no model.

    Example:

    ```python
    >>> from hf_moe.trainers import PreferenceDistillationConfig, PreferenceDistillationTrainer
    >>> trainer = PreferenceDistillationTrainer(
    ...     student,
    ...     args=PreferenceDistillationConfig("out", precompute_ref_log_probs=True),
    ...     teacher_model=teacher,
    ...     train_dataset=pairs,
    ...     processing_class=processor,
    ... )
    ```
    """

    _tag_names = ["trl", "dpo", "preference-distillation"]
    allows_dense = True
    args: Any
    processing_class: Any

    def __init__(self, model: Any, args: Any = None, *, teacher_model: Any = None, **kwargs: Any):
        args = PreferenceDistillationConfig("preference-distillation") if args is None else args
        if not isinstance(args, PreferenceDistillationConfig):
            raise TypeError(f"`args` must be a PreferenceDistillationConfig, got {type(args).__name__}.")
        if kwargs.pop("ref_model", None) is not None:
            raise ValueError("`ref_model` is the teacher here: pass `teacher_model` alone.")
        teacher = load_teacher(teacher_model or args.teacher_model_name_or_path, model, args.teacher_model_init_kwargs)
        if isinstance(model, nn.Module):
            check_teacher(unwrap_model(model), teacher)
        self._teacher_is_placed = False
        # TRL refuses to do it for data with images, whose collator drops the columns; the rest of its way stays.
        ours = args.precompute_ref_log_probs and _has_images(kwargs.get("train_dataset"))
        args.precompute_ref_log_probs = args.precompute_ref_log_probs and not ours
        try:
            super().__init__(model, teacher, args, **kwargs)
        finally:
            args.precompute_ref_log_probs = args.precompute_ref_log_probs or ours
        self._place_teacher()
        if ours:
            self.precompute_ref_logps = True
            self.data_collator = WithReference(self.data_collator)
            self.train_dataset: Any = self._with_reference(self.train_dataset)
            self.eval_dataset: Any = self._with_reference(self.eval_dataset)
        if self.precompute_ref_logps and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Nothing asks it any more, but for data that `evaluate` is given later.
            self._move_teacher("cpu")

    def _with_reference(self, dataset: Any) -> Any:
        """What the trainer evaluates on or trains with, all of it with the teacher's log-probabilities."""
        if isinstance(dataset, dict):
            return {name: self._with_reference(part) for name, part in dataset.items()}
        if dataset is None or isinstance(dataset, str) or REFERENCE_COLUMNS[0] in (dataset.column_names or ()):
            return dataset
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        return self._precompute_ref_logps(dataset, "eval", batch_size)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the class below; the teacher is asked about data with images that are new, as it is about text."""
        if self._is_vision_dataset and self.precompute_ref_logps:
            eval_dataset = self._with_reference(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _place_teacher(self) -> None:
        """Checks the teacher against the tokenizer, which TRL may have loaded, and moves it; before it computes."""
        if self._teacher_is_placed:
            return
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        teacher = self.accelerator.unwrap_model(self.ref_model)
        check_teacher(unwrap_model(self.model), teacher, len(tokenizer) if hasattr(tokenizer, "__len__") else None)
        if self.args.teacher_device is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"`teacher_device={self.args.teacher_device!r}`: FSDP and DeepSpeed shard the teacher over the "
                    "devices of all processes. Leave it out, or set `precompute_ref_log_probs=True`."
                )
            self._move_teacher(self.args.teacher_device)
        self._teacher_is_placed = True

    def _move_teacher(self, device: str) -> None:
        teacher: Any = self.accelerator.unwrap_model(self.ref_model)
        teacher = teacher.model if isinstance(teacher, OnDevice) else teacher
        self.ref_model: Any = OnDevice(teacher, device, self.accelerator.device)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._place_teacher()
        if not self._is_vision_dataset:
            return super()._precompute_ref_logps(dataset, name, batch_size)

        def reference(batch: dict[str, Any]) -> Any:
            return self.compute_ref_log_probs(self.ref_model, batch)

        return add_reference_columns(dataset, self.data_collator, reference, self.accelerator, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.extend(name for name in REFERENCE_COLUMNS if name not in columns)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.loss_types != ["kto_pair"]:
            return super()._compute_loss(model, inputs, return_outputs)
        mask = inputs["completion_mask"]
        skipped = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        arguments = {k: v for k, v in inputs.items() if k not in skipped}
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**arguments, labels=labels, use_cache=False, fused_lm_head=True)
        logps = outputs.log_probs[:, -(mask.shape[1] - 1) :].sum(dim=1).chunk(2)
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model, inputs)
        chosen, rejected = (ours - theirs for ours, theirs in zip(logps, reference, strict=True))
        self._note_rewards(chosen.detach(), rejected.detach())
        loss = kto_pair_loss(chosen, rejected, self.beta).mean()
        return (loss, outputs) if return_outputs else loss

    def _note_rewards(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = (self.accelerator.gather(self.beta * ratio) for ratio in (chosen, rejected))
        for name, values in (
            ("chosen", chosen),
            ("rejected", rejected),
            ("accuracies", (chosen > rejected).float()),
            ("margins", chosen - rejected),
        ):
            metrics[f"rewards/{name}"].append(values.mean().item())


def _has_images(dataset: Any) -> bool:
    row = None if dataset is None else next(iter(dataset))
    return row is not None and not {"image", "images"}.isdisjoint(row)
