"""Which part of a Read-ME model trains at a step, and how fast."""

import math
from dataclasses import dataclass
from typing import NamedTuple


__all__ = ["ReadMeSchedule", "ReadMeStage"]


class ReadMeStage(NamedTuple):
    """Where a step is.

    Args:
        round (`int`): From 0.
        part (`str`): `"router"` or `"experts"`: what trains.
        step (`int`): Step of this stage, from 0.
        num_steps (`int`): Steps of this stage.
    """

    round: int
    part: str
    step: int
    num_steps: int


@dataclass(frozen=True)
class ReadMeSchedule:
    """Rounds of router steps, then expert steps (Read-ME, 2410.19123, Sec. 3).

    Args:
        rounds (`int`): Rounds.
        router_steps, expert_steps (`int`): Optimizer steps of the two stages of a round.
        round_decay (`float`): Factor of the highest learning rate from a round to the next.

    Raises:
        ValueError: a number out of range.

    Example:
        ```python
        schedule = ReadMeSchedule(rounds=8, router_steps=100, expert_steps=200, round_decay=0.8)
        schedule.stage(350)  # ReadMeStage(round=1, part='router', step=50, num_steps=100)
        schedule.factor(350, "router")  # 0.8 * 0.5
        ```
    """

    rounds: int
    router_steps: int
    expert_steps: int
    round_decay: float = 1.0

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}.")
        for name in ("router_steps", "expert_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.router_steps + self.expert_steps == 0:
            raise ValueError("`router_steps` and `expert_steps` are both 0, so nothing would train; set one of them.")
        if not 0 < self.round_decay <= 1:
            raise ValueError(f"`round_decay` must be above 0 and at most 1, got {self.round_decay}.")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds."""
        return self.rounds * (self.router_steps + self.expert_steps)

    def stage(self, step: int) -> ReadMeStage:
        """The stage of optimizer step `step`, counted from 0; the last stage goes on for ever."""
        number, left = divmod(step, self.router_steps + self.expert_steps)
        if step >= self.total_steps:
            number, left = self.rounds - 1, left + (number - self.rounds + 1) * (self.router_steps + self.expert_steps)
        if left < self.router_steps:
            return ReadMeStage(number, "router", left, self.router_steps)
        return ReadMeStage(number, "experts", left - self.router_steps, self.expert_steps)

    def factor(self, step: int, part: str) -> float:
        """What the learning rate of `part` is multiplied by at `step`: a cosine from 1 to 0 within the stage, times
        `round_decay` per round; 0 while the other part trains."""
        stage = self.stage(step)
        if stage.part != part or stage.step >= stage.num_steps:
            return 0.0
        return self.round_decay**stage.round * 0.5 * (1 + math.cos(math.pi * stage.step / stage.num_steps))
