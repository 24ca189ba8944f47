"""Configuration of [`~hf_moe.trainers.ReadMeTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .read_me_schedule import ReadMeSchedule
from .read_me_targets import DISTILL_TARGETS


__all__ = ["ReadMeTrainingArguments"]


@dataclass
class ReadMeTrainingArguments(TrainingArguments):
    r"""`TrainingArguments` with the alternation of Read-ME (2410.19123, Sec. 3). Defaults are the paper's.

    Args:
        rounds (`int`, defaults to 8): Rounds of router steps, then expert steps.
        router_steps (`int`, defaults to 100): Optimizer steps per round in which the router learns L_RD and nothing
            else moves.
        expert_steps (`int`, defaults to 200): Optimizer steps per round on the language-model loss, the router fixed.
        router_learning_rate (`float`, defaults to 5e-4): Highest learning rate of the router in the first round.
        learning_rate (`float`, defaults to 5e-5): The same for everything else.
        round_decay (`float`, defaults to 0.8): Factor of both from a round to the next. Within each stage they fall to
            0 as a cosine; `lr_scheduler_type` and `warmup_steps` are not read.
        weight_decay (`float`, defaults to 0.01): As in `TrainingArguments`.
        distill_target (`str`, defaults to `"overlap"`): `"overlap"` (the paper) or `"bucketed"` (the released code);
            see [`~hf_moe.trainers.read_me_targets.distillation_loss`].
        target_temperature (`float`, defaults to 1.0): Softens (above 1) the targets of `"overlap"`.
        trained_parts (`str`, defaults to `"feed_forward"`): What expert steps train: `"feed_forward"` (experts, shared
            channels and norms; the paper does not say) or `"all"` but the router.
        max_steps (`int`, defaults to -1): All rounds; fewer may be given.

    Raises:
        ValueError: a number out of range, or more `max_steps` than the rounds have.

    Example:

    ```python
    >>> from hf_moe.trainers import ReadMeTrainingArguments
    >>> args = ReadMeTrainingArguments("out", rounds=2, router_steps=50, expert_steps=100)
    >>> args.max_steps
    300
    ```
    """

    rounds: int = field(default=8, metadata={"help": "Rounds of router steps, then expert steps."})
    router_steps: int = field(default=100, metadata={"help": "Router steps per round."})
    expert_steps: int = field(default=200, metadata={"help": "Expert steps per round."})
    router_learning_rate: float = field(default=5e-4, metadata={"help": "Highest learning rate of the router."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Highest learning rate of everything else."})
    round_decay: float = field(default=0.8, metadata={"help": "Factor of the learning rates per round."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of matrices."})
    distill_target: str = field(default="overlap", metadata={"help": "overlap or bucketed."})
    target_temperature: float = field(default=1.0, metadata={"help": "Temperature of the overlap targets."})
    trained_parts: str = field(default="feed_forward", metadata={"help": "feed_forward or all."})

    def __post_init__(self):
        schedule = self.schedule
        if self.max_steps <= 0:
            self.max_steps = schedule.total_steps
        if self.max_steps > schedule.total_steps:
            raise ValueError(
                f"`max_steps` must be at most the {schedule.total_steps} steps of {self.rounds} rounds, got "
                f"{self.max_steps}. Add rounds, or leave it out."
            )
        if self.distill_target not in DISTILL_TARGETS:
            raise ValueError(f"`distill_target` must be one of {list(DISTILL_TARGETS)}, got {self.distill_target!r}.")
        if not self.target_temperature > 0:
            raise ValueError(f"`target_temperature` must be above 0, got {self.target_temperature}.")
        if self.router_learning_rate < 0:
            raise ValueError(f"`router_learning_rate` must not be negative, got {self.router_learning_rate}.")
        if self.trained_parts not in ("feed_forward", "all"):
            raise ValueError(f"`trained_parts` must be 'feed_forward' or 'all', got {self.trained_parts!r}.")
        if self.ddp_find_unused_parameters is None:
            # In each step the parameters of the other part get no gradient.
            self.ddp_find_unused_parameters = True
        super().__post_init__()

    @property
    def schedule(self) -> ReadMeSchedule:
        """Rounds and stages."""
        return ReadMeSchedule(self.rounds, self.router_steps, self.expert_steps, self.round_decay)
