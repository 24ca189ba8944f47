"""Distils a large model into a small one on the ground-truth answers: the student mimics the teacher's predictions."""

import inspect
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from hf_moe.views import has_moe_layers, unwrap_model

from .chunked_divergence import chunked_divergence
from .language_head import LanguageHead
from .mimic_distillation_config import MimicDistillationConfig
from .moe_mixin import MoeTrainerMixin
from .teachers import check_teacher, load_teacher


__all__ = ["MimicDistillationTrainer"]

# Entries of a batch that are no input of the teacher.
TARGETS = ("labels", "shift_labels")


class _MimicLoss(SFTTrainer):
    """`SFTTrainer` with the divergence from a teacher as its loss; [`MimicDistillationTrainer`] describes it."""

    args: Any
    teacher_model: Any

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        labels = inputs["labels"]
        arguments = {k: v for k, v in inputs.items() if k not in TARGETS}
        teacher_hidden = self._teacher_hidden(arguments)
        # One position is enough for the model's own head: ours reads the last hidden states.
        short = {} if return_outputs or not self._keeps_few_logits else {"logits_to_keep": 1}
        outputs = model(**arguments, **short, use_cache=False)
        hidden, self._last_hidden = self._last_hidden, None

        targets = labels[:, 1:]
        distilled = labelled = targets != -100  # position t predicts token t + 1
        if self.args.kd_on == "all":
            mask = inputs.get("attention_mask")
            distilled = torch.ones_like(labelled) if mask is None else mask[:, 1:].bool()
        if teacher_hidden.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"the student sees {hidden.shape[1]} positions and the teacher {teacher_hidden.shape[1]} in the same "
                "batch: images take different numbers of tokens. Use a teacher with the same vision tower."
            )
        divergence, cross_entropy = chunked_divergence(
            hidden[:, :-1][distilled],
            teacher_hidden[:, :-1][distilled.to(teacher_hidden.device)],
            targets[distilled].to(hidden.device),
            lambda states: self._student_head(states, self._shared_vocab),
            lambda states: self._teacher_head(states, self._shared_vocab),
            temperature=self.args.kd_temperature,
            chunk_size=self.args.kd_chunk_size,
        )
        if num_items_in_batch is None:
            num_distilled, num_labelled = distilled.sum().clamp(min=1), labelled.sum().clamp(min=1)
        else:
            num_labelled = torch.as_tensor(num_items_in_batch).clamp(min=1)
            num_distilled = num_labelled if self.args.kd_on == "response" else self._num_distilled
        terms = {"distillation_loss": divergence / num_distilled.to(divergence.device)}
        terms["lm_loss"] = cross_entropy / num_labelled.to(cross_entropy.device)
        loss = self.args.kd_weight * terms["distillation_loss"] + self.lm_weight * terms["lm_loss"]
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is that of all processes, whose gradients will be averaged.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._note_terms(mode, divergence, cross_entropy, distilled.sum(), labelled.sum(), inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_hidden(self, arguments: dict[str, Any]) -> torch.Tensor:
        device = self._teacher_head.device
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        with self.accelerator.autocast():
            return self.teacher_model.base_model(**moved, use_cache=False).last_hidden_state

    def _note_terms(self, mode, divergence, cross_entropy, num_distilled, num_labelled, inputs) -> None:
        values = torch.stack(
            [divergence.detach(), cross_entropy.detach(), num_distilled.float(), num_labelled.float()]
        )
        kl, ce, distilled, labelled = self.accelerator.gather_for_metrics(values[None]).sum(0).tolist()
        self._metrics[mode]["distillation_loss"].append(kl / max(distilled, 1))
        self._metrics[mode]["lm_loss"].append(ce / max(labelled, 1))
        if mode == "train" and "attention_mask" in inputs:
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        labelled = super()._get_num_items_in_batch(batch_samples, device)
        if self.args.kd_on == "all" and batch_samples and labelled is not None:
            counts = [
                batch["attention_mask"][:, 1:].sum() if "attention_mask" in batch else batch["labels"][:, 1:].numel()
                for batch in batch_samples
            ]
            total = torch.as_tensor(sum(counts)).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total).sum()
            self._num_distilled = total.clamp(min=1)
        return labelled


class MimicDistillationTrainer(MoeTrainerMixin, _MimicLoss):
    r"""Mimic distillation of [LLaVA-MoD](https://huggingface.co/papers/2408.15881), Sec. 3.2: [`~trl.SFTTrainer`]
    whose loss is

        L = kd_weight * mean_t KL(p_T(. | t) || p_S(. | t)) + lm_weight * cross-entropy + router losses

    over the positions t whose next token has a label. Dense-to-dense distillation is a dense student (`lm_weight` 0),
    dense-to-sparse a Mixture-of-Experts one (`lm_weight` 1, router losses of [`MoeTrainerMixin`]).

    Teacher and student read the same batch: they need the same tokens, and the same number of tokens for an image.
    Architectures may differ, and so may the sizes their vocabularies are padded to; tokens only one of them has are
    left out. Logits never exist for all positions at once, neither the teacher's nor the student's. The teacher runs
    in evaluation mode without gradients, is not saved, and stays whole on every process.

    Note: the released code masks with labels that are not shifted, so that the first token of an answer is never
    distilled; here it is. It also drops the teacher's entropy from the value, which changes no gradient.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The student, dense or a Mixture-of-Experts.
        teacher_model (`str` or `PreTrainedModel`, *optional*): The teacher; that of `args` by default.
        args ([`MimicDistillationConfig`], *optional*): Configuration of the run.
        **kwargs: As in [`~trl.SFTTrainer`]; image-text datasets are collated there.

    Raises:
        ValueError: the two do not fit: another number of tokens or another placeholder for an image, or a vocabulary
            that lacks tokens of the tokenizer; or FSDP or DeepSpeed shards the student.
        TypeError: `args` is of another class, or `teacher_model` is no model.

    Example:

    ```python
    >>> from hf_moe.trainers import MimicDistillationConfig, MimicDistillationTrainer
    >>> args = MimicDistillationConfig("out", learning_rate=2e-5, max_length=None)
    >>> trainer = MimicDistillationTrainer(
    ...     student, args=args, teacher_model=teacher, train_dataset=rows, processing_class=processor
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "mimic-distillation"]
    allows_dense = True

    def __init__(self, model: Any, args: Any = None, *, teacher_model: Any = None, **kwargs: Any):
        args = MimicDistillationConfig("mimic-distillation") if args is None else args
        if not isinstance(args, MimicDistillationConfig):
            raise TypeError(f"`args` must be a MimicDistillationConfig, got {type(args).__name__}.")
        self._last_hidden: Any = None
        self._num_distilled = torch.ones((), dtype=torch.long)
        teacher = load_teacher(teacher_model or args.teacher_model_name_or_path, model, args.teacher_model_init_kwargs)
        if isinstance(model, nn.Module):
            check_teacher(unwrap_model(model), teacher)
        super().__init__(model, args=args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{type(self).__name__} does not support FSDP and DeepSpeed, which gather the student's output matrix "
                "during its own forward only. Train with data parallelism, `accelerate launch --multi_gpu`."
            )
        student = unwrap_model(self.model)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        num_tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        self._shared_vocab = check_teacher(student, teacher, num_tokens)
        self.lm_weight = args.lm_weight if args.lm_weight is not None else float(has_moe_layers(student))
        if args.kd_weight == 0 and self.lm_weight == 0:
            raise ValueError("`kd_weight` is 0 and `lm_weight` of a dense student is 0 by default: set one above 0.")
        if getattr(teacher, "hf_device_map", None) is None:  # else it has been placed already
            teacher.to(args.teacher_device or self.accelerator.device)
        self.teacher_model = teacher
        self._student_head, self._teacher_head = LanguageHead(student), LanguageHead(teacher)
        self._keeps_few_logits = "logits_to_keep" in inspect.signature(type(student).forward).parameters
        student.base_model.register_forward_hook(self._remember_hidden)

    def _remember_hidden(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._last_hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
