"""Configuration of preference distillation."""

from dataclasses import dataclass, field
from typing import Any

from .dpo_config import MoeDPOConfig


__all__ = ["PreferenceDistillationConfig"]


@dataclass
class PreferenceDistillationConfig(MoeDPOConfig):
    """[`MoeDPOConfig`] of [`PreferenceDistillationTrainer`]: learning rate 2e-6 and beta 0.1, as in the paper's code.

    Args:
        learning_rate (`float`, defaults to 2e-6): The teacher as reference starts far from the student.
        loss_type (`list[str]`, defaults to `["sigmoid"]`): As of `trl.DPOConfig`, or `["kto_pair"]` alone, the default
            of the released code.
        teacher_model_name_or_path (`str`, *optional*): The teacher, where the trainer is given none.
        teacher_model_init_kwargs (`dict`, *optional*): Keyword arguments of `from_pretrained`, where the teacher is
            given as a string.
        teacher_device (`str`, *optional*): Where the teacher runs; where the student does by default.

    Raises:
        ValueError: `"kto_pair"` is mixed with other losses, or with options it does not know; or the reference shall
            follow the student.
    """

    learning_rate: float = field(default=2e-6, metadata={"help": "The initial learning rate for AdamW."})
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher, a Hub id or a folder."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the teacher."}
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Device of the teacher, such as cpu or cuda:1."}
    )

    _VALID_DICT_FIELDS = [*MoeDPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        if self.sync_ref_model:
            raise ValueError("`sync_ref_model` must be False: it would write the student's weights into the teacher.")
        if "kto_pair" in self.loss_type:
            if len(self.loss_type) > 1:
                raise ValueError(f"`loss_type`: 'kto_pair' cannot be mixed with other losses, got {self.loss_type}.")
            for name, off in (
                ("ld_alpha", None),
                ("use_weighting", False),
                ("f_divergence_type", "reverse_kl"),
                ("label_smoothing", 0.0),
                ("loss_weights", None),
            ):
                value = getattr(self, name)
                if value != off:
                    raise ValueError(
                        f"`{name}={value!r}` has no meaning with `loss_type=['kto_pair']`; leave it at {off!r}."
                    )
