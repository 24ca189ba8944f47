"""Arguments of the trainer of local experts."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


__all__ = ["LocalExpertTrainingArguments"]


@dataclass
class LocalExpertTrainingArguments(TrainingArguments):
    """`TrainingArguments` of [`LocalExpertTrainer`]; epochs, batch size and learning rate are those of each fit.

    Args:
        error_weight (`float`, defaults to 1.0): An example that the global expert gets wrong counts this much more
            when the local expert is fitted.
        num_folds (`int`, defaults to 5): The user's data are split into so many parts; the gate's labels for a part
            come from a local expert that has not seen it.
        gate_target (`str`, defaults to `"correctness"`): `"correctness"`: who is right; `"domain"`: whose data it is.
        max_generic_drop (`float`, defaults to 0.002): How much of the accuracy on generic data may be lost when the
            threshold is calibrated, as a fraction.
        calibrate (`bool`, defaults to `True`): Set the threshold by that rule after training.
        num_replay (`int`, *optional*): Generic examples the gate sees; as many as the user's if left out.

    Raises:
        ValueError: A value is not allowed.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of each fit."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Weight decay of each fit."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Epochs of each fit."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size of each fit."})
    error_weight: float = field(default=1.0, metadata={"help": "Additional weight of the global expert's errors."})
    num_folds: int = field(default=5, metadata={"help": "Parts of the user's data for the gate's labels."})
    gate_target: str = field(default="correctness", metadata={"help": "'correctness' or 'domain'."})
    max_generic_drop: float = field(default=0.002, metadata={"help": "Accuracy on generic data that may be lost."})
    calibrate: bool = field(default=True, metadata={"help": "Calibrate the threshold after training."})
    num_replay: int | None = field(default=None, metadata={"help": "Generic examples for the gate."})

    def __post_init__(self):
        super().__post_init__()
        if self.label_names is None:
            self.label_names = ["labels"]  # or Trainer drops them for a classifier that takes none
        if self.error_weight < 0:
            raise ValueError(f"`error_weight` must be at least 0, got {self.error_weight}.")
        if self.num_folds < 2:
            raise ValueError(
                f"`num_folds` must be at least 2, got {self.num_folds}: a local expert is always right on what it was "
                "fitted to, so the gate would always choose it."
            )
        if self.gate_target not in ("correctness", "domain"):
            raise ValueError(f"`gate_target` must be 'correctness' or 'domain', got {self.gate_target!r}.")
        if not 0 <= self.max_generic_drop <= 1:
            raise ValueError(f"`max_generic_drop` must be between 0 and 1, got {self.max_generic_drop}.")
        if self.num_replay is not None and self.num_replay < 1:
            raise ValueError(f"`num_replay` must be at least 1, got {self.num_replay}.")
