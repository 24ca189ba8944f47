"""Configuration of mimic distillation."""

from dataclasses import dataclass, field
from typing import Any

from .sft_config import MoeSFTConfig


__all__ = ["MimicDistillationConfig"]


@dataclass
class MimicDistillationConfig(MoeSFTConfig):
    """[`MoeSFTConfig`] of [`MimicDistillationTrainer`].

    Args:
        teacher_model_name_or_path (`str`, *optional*): The teacher, where the trainer is given none.
        teacher_model_init_kwargs (`dict`, *optional*): Keyword arguments of `from_pretrained`, where the teacher is
            given as a string.
        teacher_device (`str`, *optional*): Where the teacher runs; where the student does by default.
        kd_weight (`float`, defaults to 1.0): Weight of the divergence from the teacher.
        lm_weight (`float`, *optional*): Weight of the cross-entropy with the labels. By default 1 for a
            Mixture-of-Experts and 0 for a dense model, as the paper's two stages have it.
        kd_on (`str`, defaults to `"response"`): `"response"`: tokens that have labels; `"all"`: every token.
        kd_temperature (`float`, defaults to 1.0): Of teacher and student.
        kd_chunk_size (`int`, defaults to 128): Positions whose logits exist at a time.

    Raises:
        ValueError: a value out of range; packed or padding-free batches.
    """

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher, a Hub id or a folder."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the teacher."}
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Device of the teacher, such as cpu or cuda:1."}
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence from the teacher."})
    lm_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the cross-entropy with the labels; 1 for a MoE and 0 for a dense model by default."
        },
    )
    kd_on: str = field(default="response", metadata={"help": "Tokens to distil: response (labelled ones) or all."})
    kd_temperature: float = field(default=1.0, metadata={"help": "Temperature of teacher and student."})
    kd_chunk_size: int = field(default=128, metadata={"help": "Positions whose logits exist at a time."})

    _VALID_DICT_FIELDS = [*MoeSFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self):
        if self.kd_on not in ("response", "all"):
            raise ValueError(f"`kd_on` must be 'response' or 'all', got {self.kd_on!r}.")
        for name in ("kd_weight", "lm_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")
        if self.kd_weight == 0 and self.lm_weight == 0:
            raise ValueError("`kd_weight` and `lm_weight` are both 0, which leaves no loss: set one above 0.")
        if not 0 < self.kd_temperature < float("inf"):
            raise ValueError(f"`kd_temperature` must be above 0 and finite, got {self.kd_temperature}.")
        if self.kd_chunk_size < 1:
            raise ValueError(f"`kd_chunk_size` must be at least 1, got {self.kd_chunk_size}.")
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}=True` is not supported: teacher and student get padded batches. Set it to False."
                )
        super().__post_init__()
