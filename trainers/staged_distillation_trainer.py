"""Mixture-of-Students: a shallower Mixture-of-Experts that learns from a deeper one, and then by itself."""

from trl import SFTTrainer

from .staged_distillation_mixin import StagedDistillationMixin


__all__ = ["StagedDistillationTrainer"]


class StagedDistillationTrainer(StagedDistillationMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] with a teacher until `kd_stop_step`, and with the router losses of hf_moe; see
    [`StagedDistillationMixin`] for the loss. Mixture-of-Students of
    [DeepSpeed-MoE](https://huggingface.co/papers/2201.05596), Sec. 4.2.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`, *optional*): The student; by default the teacher without every
            so-maniest layer (`student_drop_every`), with random weights.
        args ([`StagedDistillationConfig`]): Configuration of the run.
        teacher_model (`PreTrainedModel` or `str`, *optional*): The teacher; `args.teacher_model_name_or_path` by
            default.
        *args, **kwargs: As in [`~trl.SFTTrainer`]; text to pre-train on is a dataset with a column `"text"`.

    Raises:
        ValueError, TypeError: See [`StagedDistillationMixin`].

    Example:

    ```python
    >>> from hf_moe import PrMoeForCausalLM, drop_layers
    >>> from hf_moe.trainers import StagedDistillationConfig, StagedDistillationTrainer
    >>> teacher = PrMoeForCausalLM.from_pretrained("pr-moe")
    >>> student = PrMoeForCausalLM(drop_layers(teacher.config, every=8))  # 21 of 24 layers
    >>> args = StagedDistillationConfig("mos", max_steps=10_000, kd_stop_step=7_000)
    >>> trainer = StagedDistillationTrainer(
    ...     student, args, teacher_model=teacher, train_dataset=text, processing_class=tokenizer
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "moe", "mixture-of-students"]
