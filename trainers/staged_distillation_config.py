"""Configuration of staged knowledge distillation."""

from dataclasses import dataclass, field
from typing import Any

from .sft_config import MoeSFTConfig


__all__ = ["StagedDistillationArguments", "StagedDistillationConfig"]


@dataclass
class StagedDistillationArguments:
    """Arguments of [`~hf_moe.trainers.StagedDistillationMixin`].

    Args:
        kd_temperature (`float`, defaults to 1.0): T, divides the logits of both models.
        kd_weight (`float`, defaults to 1.0): Weight of the distillation term.
        kd_stop_step (`int`, *optional*): Optimizer step from which on the student learns from the text alone; to the
            end by default. 0 is training without a teacher.
        teacher_model_name_or_path (`str`, *optional*): The teacher, where `teacher_model` is not given.
        teacher_model_init_kwargs (`dict`, *optional*): Keyword arguments of its `from_pretrained`.
        student_drop_every (`int`, *optional*): Where no `model` is given: the student is the teacher without every
            so-maniest layer ([`~hf_moe.drop_layers`]), with random weights.

    Raises:
        ValueError: a value is out of range.
    """

    kd_temperature: float = field(default=1.0, metadata={"help": "Divides the logits of teacher and student."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the distillation term."})
    kd_stop_step: int | None = field(
        default=None, metadata={"help": "Optimizer step from which on nothing is distilled; to the end by default."}
    )
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "The teacher."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the teacher's `from_pretrained`."}
    )
    student_drop_every: int | None = field(
        default=None,
        metadata={"help": "Without a model: the student is the teacher without every so-maniest layer, untrained."},
    )

    def __post_init__(self):
        if not 0 < self.kd_temperature < float("inf"):
            raise ValueError(f"`kd_temperature` must be above 0 and finite, got {self.kd_temperature}.")
        if not 0 <= self.kd_weight < float("inf"):
            raise ValueError(f"`kd_weight` must be at least 0 and finite, got {self.kd_weight}.")
        if self.kd_stop_step is not None and self.kd_stop_step < 0:
            raise ValueError(
                f"`kd_stop_step` must be at least 0, or None to distil to the end, got {self.kd_stop_step}."
            )
        super().__post_init__()  # type: ignore[misc]


@dataclass
class StagedDistillationConfig(StagedDistillationArguments, MoeSFTConfig):
    """`trl.SFTConfig` of [`StagedDistillationTrainer`], with the fields of [`StagedDistillationArguments`] and of
    [`~hf_moe.trainers.moe_config.MoeArguments`].

    Example:

    ```python
    >>> from hf_moe.trainers import StagedDistillationConfig
    >>> args = StagedDistillationConfig("out", use_cpu=True, max_steps=1000, kd_stop_step=700)
    ```
    """

    _VALID_DICT_FIELDS = [*MoeSFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]
