"""Distils a dense model into a Mixture-of-Experts made from it, layer by layer."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_moe.modes import eval_mode

from .distillation_losses import hidden_state_discrepancy, prediction_discrepancy
from .moe_distillation_config import MoEDistillationConfig
from .moe_mixin import MoeTrainerMixin


__all__ = ["MoEDistillationTrainer"]

# What a teacher is not asked: losses of its own.
TARGETS = ("labels", "start_positions", "end_positions", "shift_labels", "num_items_in_batch")


class MoEDistillationTrainer(MoeTrainerMixin, Trainer):
    r"""`Trainer` whose loss is

        L = L_task + distillation_weight * (sum_l MSE(X_l, X_l^teacher) + prediction_weight * L_prediction) + routers

    with the hidden states X_l of the embeddings and of every layer ([`hidden_state_discrepancy`]): the recovery after
    an importance split in [MoEBERT](https://huggingface.co/papers/2204.07675) (layer-wise distillation) and
    [COMET-BERT](https://huggingface.co/papers/2306.02824), Supplement. The router losses are those of
    [`MoeTrainerMixin`], with the routers' own regularisers; encoders and decoders are trained alike.

    The teacher, usually the fine-tuned dense model that was upcycled, runs in evaluation mode without gradients, is
    left as it is and is not saved. Padding (`attention_mask`) is left out of the distance, and each token of an
    optimizer step counts once, however the step is cut into micro-batches and processes. Evaluation losses are those
    of the task alone. Logs gain `distillation_loss`, without its weight.

    Args:
        model (`PreTrainedModel`, *optional*): The student; or `model_init`.
        args ([`MoEDistillationConfig`], *optional*): Configuration of the run.
        teacher_model (`PreTrainedModel`): With the student's hidden size, number of layers and vocabulary.
        **kwargs: As in [`~transformers.Trainer`].

    Raises:
        ValueError: the teacher does not fit, is the student itself, or reentrant checkpointing would drop the
            gradient of the distance.
        TypeError: `teacher_model` is no model, or `args` is of another class.

    Example:

    ```python
    >>> from hf_moe import upcycle
    >>> from hf_moe.trainers import MoEDistillationConfig, MoEDistillationTrainer
    >>> from hf_moe.upcycling import ImportanceShared
    >>> student, _ = upcycle(
    ...     bert, num_experts=4, top_k=1, experts=ImportanceShared(512, width=768), calibration=batches,
    ...     router_type="comet",
    ... )
    >>> args = MoEDistillationConfig("out", distillation_weight=2.0)
    >>> MoEDistillationTrainer(student, args, teacher_model=bert, train_dataset=rows).train()
    ```

    On several processes: `accelerate launch --multi_gpu --num_processes 2 train.py`, or
    `hf-moe train distillation --multi_gpu --num_processes 2 ...`.
    """

    args: Any

    def __init__(self, model: Any = None, args: Any = None, *, teacher_model: Any, **kwargs: Any):
        args = MoEDistillationConfig("moe_distillation") if args is None else args
        if not isinstance(args, MoEDistillationConfig):
            raise TypeError(f"`args` must be a MoEDistillationConfig, got {type(args).__name__}.")
        if not isinstance(teacher_model, PreTrainedModel):
            raise TypeError(
                f"`teacher_model` must be a transformers model, got {type(teacher_model).__name__}; load it with "
                "`from_pretrained`."
            )
        checkpointing: Any = args.activation_checkpointing_kwargs or {}
        if checkpointing.get("use_reentrant"):
            raise ValueError(
                "`activation_checkpointing_kwargs={'use_reentrant': True}` would drop the gradient of the distance to "
                "the teacher. Use `{'use_reentrant': False}`, the default."
            )
        if model is not None:
            check_teacher(model, teacher_model)
        super().__init__(model, args, **kwargs)
        if model is None:
            check_teacher(self.model, teacher_model)
        placed = getattr(teacher_model, "hf_device_map", None) or getattr(teacher_model, "is_quantized", False)
        self.teacher_model = teacher_model if placed else teacher_model.to(self.accelerator.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The task's loss with router losses and, in training, the weighted distance to the teacher."""
        weight = self.args.distillation_weight
        if weight == 0 or not (self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        theirs = self.run_teacher(inputs)
        recorded = {**inputs, "output_hidden_states": True}
        result: Any = super().compute_loss(model, recorded, True, num_items_in_batch)
        loss, ours = result
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        distance = hidden_state_discrepancy(ours["hidden_states"], theirs["hidden_states"], mask)
        if self.args.prediction_weight:
            distance = distance + self.args.prediction_weight * prediction_discrepancy(ours, theirs, mask)
        self._note_metric("distillation_loss", distance)
        states = ours["hidden_states"][0]
        num_tokens = torch.tensor(states.shape[:2].numel(), device=states.device) if mask is None else mask.sum()
        scale = self._token_mean_scale(num_tokens, num_items_in_batch)
        loss = loss + (weight * scale * distance).to(loss.device)
        return (loss, ours) if return_outputs else loss

    @torch.no_grad()
    def run_teacher(self, inputs: dict[str, Any]) -> Any:
        """The teacher's output, with `hidden_states`, for the inputs of the student."""
        asked = {name: value for name, value in inputs.items() if name not in TARGETS}
        with eval_mode(self.teacher_model), self.accelerator.autocast():
            return self.teacher_model(**asked, output_hidden_states=True, return_dict=True)


def check_teacher(student: Any, teacher: PreTrainedModel) -> None:
    """Refuses a teacher whose hidden states cannot be compared with the student's.

    Raises:
        ValueError: names what differs, both values, and what is needed.
    """
    if teacher is student:
        raise ValueError("`teacher_model` is the student itself; pass the dense model it was made from.")
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        mine, other = getattr(ours, name, None), getattr(theirs, name, None)
        if mine != other:
            raise ValueError(
                f"`teacher_model` has `{name}` {other} and the student {mine}: layers are compared one by one, on the "
                "same tokens. Use the dense model the student was made from, or one of its shape."
            )
