"""Configuration of contrastive training."""

import math
from dataclasses import dataclass, field

from .moe_config import MoeTrainingArguments


__all__ = ["PARTS", "ContrastiveConfig"]

#: What may be trained: everything, feed-forwards (dense or experts) alone, routers alone, or experts and routers.
PARTS = ("all", "feed_forward", "router", "moe")


@dataclass
class ContrastiveConfig(MoeTrainingArguments):
    """[`MoeTrainingArguments`] of [`ContrastiveTrainer`]; defaults are those of multistage contrastive learning in
    CLIP-MoE's code.

    Args:
        trained (`str`, defaults to `"feed_forward"`): `"feed_forward"`, the stages that make experts; `"router"`, the
            tuning after they are put together (there with learning rate 1e-6 and weight decay 0.01);
            `"moe"`, experts and routers, as for experts that are copies; or `"all"`.
        label_smoothing (`float`, defaults to 0.1): In both directions.
        fixed_logit_scale (`float`, *optional*, defaults to ln 100): Value of `logit_scale` while training; `None`
            leaves it as it is, trained only with `trained="all"`.

    > Parameters with another default: `learning_rate` 1e-5, `weight_decay` 0.2, a cosine after 200 steps of warm-up,
    > one epoch, and `remove_unused_columns` off.

    Raises:
        ValueError: a value out of range.

    Example:

    ```python
    >>> from hf_moe.trainers import ContrastiveConfig
    >>> args = ContrastiveConfig("out", trained="router", learning_rate=1e-6, weight_decay=1e-2, use_cpu=True)
    ```
    """

    trained: str = field(
        default="feed_forward", metadata={"help": "What is trained: feed_forward, router, moe (both) or all."}
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "Label smoothing of both directions."})
    fixed_logit_scale: float | None = field(
        default=math.log(100), metadata={"help": "Value of logit_scale while training; none leaves it as it is."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=0.2, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=200, metadata={"help": "Steps of linear warm-up."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Remove columns the model does not read."})

    def __post_init__(self):
        if self.trained not in PARTS:
            raise ValueError(f"`trained` must be one of {list(PARTS)}, got {self.trained!r}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be at least 0 and below 1, got {self.label_smoothing}.")
        super().__post_init__()
