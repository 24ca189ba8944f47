"""Configuration of [`MoEDistillationTrainer`]."""

import math
from dataclasses import dataclass, field

from .moe_config import MoeTrainingArguments


__all__ = ["MoEDistillationConfig"]


@dataclass
class MoEDistillationConfig(MoeTrainingArguments):
    """[`MoeTrainingArguments`] of [`MoEDistillationTrainer`].

    Args:
        distillation_weight (`float`, *optional*, defaults to 1.0): Weight of the distance to the teacher. MoEBERT and
            COMET-BERT search in 1, 2, 3 and 5.
        prediction_weight (`float`, *optional*, defaults to 0.0): Weight of the predictions within that distance,
            beside the hidden states, which have 1. MoEBERT's code has 1 here too.

    Raises:
        ValueError: a weight is negative or not finite.

    Example:

    ```python
    >>> from hf_moe.trainers import MoEDistillationConfig
    >>> args = MoEDistillationConfig("out", distillation_weight=2.0, learning_rate=3e-5)
    ```
    """

    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the distance to the teacher."})
    prediction_weight: float = field(
        default=0.0, metadata={"help": "Weight of the predictions within that distance; hidden states have 1."}
    )

    def __post_init__(self):
        for name in ("distillation_weight", "prediction_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")
        super().__post_init__()
