"""Configuration of guidance distillation."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


__all__ = ["LOSSES", "GuidanceDistillationConfig"]

LOSSES = ("l2", "l1", "weighted_l2")


@dataclass
class GuidanceDistillationConfig(TrainingArguments):
    """`transformers.TrainingArguments` of [`GuidanceDistillationTrainer`], with the defaults of the authors' code.

    Args:
        loss_type (`str`, *optional*, defaults to `"l2"`): `"l2"`, `"l1"`, or `"weighted_l2"`: the square, weighted by
            `0.5 |1 - cos(e_c, e_w)|` per sample, which needs trajectories with `store_conditional=True`.
        base_in_eval (`bool`, *optional*, defaults to `True`): Keep the base in evaluation mode while the adapters
            train: no dropout in it, and no class labels dropped.

    > Parameters with another default: `learning_rate` 1e-4 (AdamW, no weight decay), 5000 steps of 64 items, of which
    > the first tenth warm up from `1e-4 * learning_rate`; a cosine leads back there.

    Raises:
        ValueError: `loss_type` is unknown.

    Example:

    ```python
    >>> from hf_moe.trainers import GuidanceDistillationConfig
    >>> args = GuidanceDistillationConfig("out", max_steps=500, use_cpu=True)
    ```
    """

    loss_type: str = "l2"
    base_in_eval: bool = True
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    max_steps: int = 5000
    per_device_train_batch_size: int = 64
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine_warmup_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"min_lr_rate": 1e-4, "warmup_lr_rate": 1e-4}
    )
    remove_unused_columns: bool | None = False
    prediction_loss_only: bool = True

    def __post_init__(self):
        if self.loss_type not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {list(LOSSES)}, got {self.loss_type!r}.")
        if self.label_names is None:
            self.label_names = ["agd_target"]
        super().__post_init__()
