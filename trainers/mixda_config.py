"""Arguments of [`MixdaTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


__all__ = ["MixdaTrainingArguments"]


@dataclass
class MixdaTrainingArguments(TrainingArguments):
    """`TrainingArguments` of [`MixdaTrainer`]; the defaults are those of the first stage in the paper (MixDA, arXiv
    2306.05406) and its released code.

    Args:
        lambda_knowledge (`float`, defaults to 0.5): Weight of the knowledge loss in `L = lambda * L_K + L_S`.
        sampling_reduction (`str`, defaults to `"mean"`): Of L_S, see [`~hf_moe.adapters.mixda.sampling_loss`].
        general_batch_size (`int`, *optional*): Rows of ordinary text per process and micro-batch;
            `per_device_train_batch_size` if left out.
        max_length (`int`, *optional*): Longer texts are cut, where the trainer makes the collators.
        gate_learning_rate (`float`, *optional*, defaults to 2e-4): Of the gates; `None` is `learning_rate`.
        learning_rate (`float`, defaults to 1e-4): As in the paper.
        weight_decay (`float`, defaults to 0.05): As in the paper.
        num_train_epochs (`float`, defaults to 10): As in the paper.
        per_device_train_batch_size (`int`, defaults to 20): As in the paper, for running text.

    Raises:
        ValueError: A value is not among those allowed.

    Example:

    ```python
    >>> from hf_moe.trainers import MixdaTrainingArguments
    >>> args = MixdaTrainingArguments("out", lambda_knowledge=0.5, max_length=128)
    ```
    """

    lambda_knowledge: float = field(default=0.5, metadata={"help": "Weight of the knowledge loss."})
    sampling_reduction: str = field(default="mean", metadata={"help": "Of the sampling loss: mean or sum."})
    general_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of ordinary text per micro-batch; as many as of the domain by default."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longer texts are cut."})
    gate_learning_rate: float | None = field(default=2e-4, metadata={"help": "Learning rate of the gates."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of everything else."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay."})
    num_train_epochs: float = field(default=10, metadata={"help": "Epochs over the domain's data."})
    per_device_train_batch_size: int = field(default=20, metadata={"help": "Rows of the domain per micro-batch."})

    def __post_init__(self):
        super().__post_init__()
        if self.lambda_knowledge < 0:
            raise ValueError(f"`lambda_knowledge` must not be negative, got {self.lambda_knowledge}.")
        if self.sampling_reduction not in ("mean", "sum"):
            raise ValueError(f"`sampling_reduction` must be 'mean' or 'sum', got {self.sampling_reduction!r}.")
        for name in ("general_batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.gate_learning_rate is not None and self.gate_learning_rate < 0:
            raise ValueError(f"`gate_learning_rate` must not be negative, got {self.gate_learning_rate}.")
