"""Knowledge distillation that stops at a step, for any Trainer of causal language models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .chunked_divergence import chunked_divergence
from .language_head import LanguageHead
from .moe_mixin import MoeTrainerMixin
from .teachers import check_teacher, load_teacher


__all__ = ["StagedDistillationMixin"]

# What is not for the teacher: labels, and what the trainer asks of the student.
STUDENTS_OWN = ("labels", "shift_labels", "num_items_in_batch", "output_router_logits", "use_cache")


class StagedDistillationMixin(MoeTrainerMixin):
    r"""Goes in front of a Trainer class, in place of [`MoeTrainerMixin`], whose router losses it has. Before
    `kd_stop_step`, the loss of a step is

        L = L_class + kd_weight * 1/M sum_t T^2 KL(softmax(z'_t / T) || softmax(z_t / T)) + router losses

    over the M tokens of the step that have a label, z' the logits of the teacher; from then on, the loss of the class
    it is mixed into and nothing else, bit for bit. Mixture-of-Students,
    [DeepSpeed-MoE](https://huggingface.co/papers/2201.05596), Sec. 4.2: a student that is distilled to the end is
    worse than one that is left alone for the last part.

    The term is divided by the tokens of the whole optimizer step (`num_items_in_batch`), as the cross-entropy is, so
    that it does not depend on accumulation or on the number of processes. The step is `state.global_step`: a resumed
    run changes stage where an uninterrupted one does. Evaluation losses hold no distillation term. Logs gain
    `kd_loss`, the mean without its weight, while there is distillation.

    The teacher is frozen, in evaluation mode, and not saved. Logits of teacher and student exist for some positions
    at a time.

    Note: FSDP and DeepSpeed are refused, because the student's output matrix is used beside its own forward.

    Args:
        model (`PreTrainedModel`, *optional*): The student. By default it is made of the teacher, see
            `student_drop_every` of [`StagedDistillationArguments`].
        args ([`StagedDistillationArguments`]): Configuration of the run, in a class with the Trainer's arguments.
        teacher_model (`PreTrainedModel` or `str`, *optional*): With the student's vocabulary; by default
            `args.teacher_model_name_or_path`. It may be of any family.

    Raises:
        ValueError: there is no teacher, it is the student itself, its vocabulary is another, or there is neither a
            student nor `student_drop_every`.
        TypeError: `teacher_model` is no model, or `args` lacks the arguments above.

    Example:

    ```python
    >>> class Pretraining(StagedDistillationMixin, Trainer):
    ...     pass
    ```
    """

    args: Any

    def __init__(self, model: Any = None, args: Any = None, *more: Any, teacher_model: Any = None, **kwargs: Any):
        if not hasattr(args, "kd_stop_step"):
            raise TypeError(
                f"`args` must be a StagedDistillationConfig, or a class with StagedDistillationArguments, got "
                f"{type(args).__name__}."
            )
        teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher is None:
            raise ValueError("there is no teacher. Pass `teacher_model`, or set `teacher_model_name_or_path`.")
        teacher = load_teacher(teacher, model, args.teacher_model_init_kwargs)
        if model is None:
            model = _student_of(teacher, args.student_drop_every)
        self._kd_hidden: list[torch.Tensor] | None = None
        self._kd_sums: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__(model, args, *more, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{type(self).__name__} does not support FSDP and DeepSpeed, which gather the student's output matrix "
                "during its own forward only. Train with data parallelism, `accelerate launch --multi_gpu`."
            )
        student: Any = self._moe_model
        self._kd_vocabulary = _shared_vocabulary(student, teacher, self.processing_class)
        self.teacher_model: Any = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self._kd_heads = LanguageHead(student), LanguageHead(teacher)
        student.base_model.register_forward_hook(self._note_hidden_states)

    @property
    def is_distilling(self) -> bool:
        """Whether the current optimizer step has a distillation term."""
        stop = self.args.kd_stop_step
        return self.args.kd_weight > 0 and (stop is None or self.state.global_step < stop)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of the class below plus, in the first stage of training, the distillation term."""
        if not (self.model.training and torch.is_grad_enabled() and self.is_distilling):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)
        with self._student_hidden_states() as hidden:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        loss = loss + self._distillation(hidden[0], batch, num_items_in_batch).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _distillation(
        self, hidden: torch.Tensor, batch: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """kd_weight * T^2 KL, scaled as the loss of the class below is; `hidden` `(B, S, D)`."""
        targets = batch.get("shift_labels")
        if targets is None:
            targets = nn.functional.pad(batch["labels"][..., 1:], (0, 1), value=-100)  # (B, S)
        with torch.no_grad():
            teacher = self.teacher_model.base_model(
                **{name: value for name, value in batch.items() if name not in STUDENTS_OWN}, use_cache=False
            ).last_hidden_state
        counted = targets != -100
        ours, theirs = self._kd_heads
        total, _ = chunked_divergence(
            hidden[counted.to(hidden.device)],
            teacher[counted.to(teacher.device)],
            targets[counted].to(hidden.device),
            lambda states: ours(states, self._kd_vocabulary),
            lambda states: theirs(states, self._kd_vocabulary),
            temperature=self.args.kd_temperature,
            chunk_size=1024,
        )
        number = counted.sum().to(total.device)
        self._note_distillation(total.detach(), number)
        if num_items_in_batch is None or not self._loss_is_summed(num_items_in_batch):
            return self.args.kd_weight * total / number.clamp(min=1)
        ranks = self.accelerator.num_processes // self.get_tp_size()
        factor = ranks if self.args.average_tokens_across_devices else 1
        items = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        return self.args.kd_weight * factor * total / items

    # -- hidden states of the student's own pass -----------------------------------------------------------------
    @contextmanager
    def _student_hidden_states(self) -> Iterator[list[torch.Tensor]]:
        self._kd_hidden = []
        try:
            yield self._kd_hidden
        finally:
            self._kd_hidden = None

    def _note_hidden_states(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        # Inert outside `compute_loss` and without gradients; the hook stays, or a compiled model would compile again.
        if self._kd_hidden is not None and torch.is_grad_enabled():
            self._kd_hidden.append(output[0])

    # -- logs ----------------------------------------------------------------------------------------------------
    def _note_distillation(self, total: torch.Tensor, number: torch.Tensor) -> None:
        before = self._kd_sums or (torch.zeros_like(total), torch.zeros_like(number))
        self._kd_sums = before[0] + total, before[1] + number

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the class below, with the distillation term of the tokens since the last log."""
        if self.model.training and self._kd_sums is not None:
            sums: Any = self.accelerator.reduce(torch.stack([self._kd_sums[0], self._kd_sums[1].float()]), "sum")
            logs["kd_loss"] = (sums[0] / sums[1].clamp(min=1)).item()
            self._kd_sums = None
        super().log(logs, *args, **kwargs)


def _student_of(teacher: Any, drop_every: int | None) -> Any:
    """A student with random weights."""
    from hf_moe.models.drop_layers import drop_layers

    if drop_every is None:
        raise ValueError("there is no student. Pass `model`, or set `student_drop_every` to make one of the teacher.")
    config = drop_layers(teacher.config, every=drop_every)
    config._name_or_path = teacher.config._name_or_path  # where the tokenizer is
    return type(teacher)(config)


def _shared_vocabulary(student: Any, teacher: Any, processing_class: Any) -> int:
    """Tokens both know; they may be padded to different sizes where a tokenizer says how many there are."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    num_tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    shared = check_teacher(student, teacher, num_tokens)
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if num_tokens is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher_model` has a vocabulary of {sizes[1]} tokens, the student one of {sizes[0]}. Use a teacher "
            "with the student's tokenizer, and pass it as `processing_class` if one of the two is padded."
        )
    return shared
