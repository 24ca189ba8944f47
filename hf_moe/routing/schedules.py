"""Schedules: values that depend on the optimizer step and nothing else, so that a resumed run continues exactly."""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "DecaySchedule",
    "ExponentialSchedule",
    "LinearSchedule",
    "MultiStepSchedule",
    "QuarterCosineSchedule",
    "Schedule",
    "SequenceSchedule",
    "StepSchedule",
    "parse_schedules",
    "schedule_from_dict",
]

#: Allowed values of well-known router buffers: lower limit, whether the limit itself is allowed.
LOWER_LIMITS: dict[str, tuple[float, bool]] = {"temperature": (0.0, False), "noise_std": (0.0, True)}


@dataclass(frozen=True)
class Schedule(ABC):
    """A value for every optimizer step. Schedules are immutable, comparable and JSON-able.

    Numbers of steps are an `int`, or a `float` in (0, 1]: a fraction of the run's `max_steps`.
    """

    type: ClassVar[str]

    @abstractmethod
    def value(self, step: int, max_steps: int | None = None) -> float:
        """The value while `step` optimizer steps are done.

        Args:
            step (`int`): Finished optimizer steps (`state.global_step`).
            max_steps (`int`, *optional*): Steps of the whole run; needed where a number of steps is a fraction.

        Raises:
            ValueError: a fraction was given and `max_steps` is not known.
        """

    @abstractmethod
    def lowest(self) -> float:
        """The smallest value this schedule ever takes."""

    @abstractmethod
    def highest(self) -> float:
        """The largest value this schedule ever takes."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description; [`schedule_from_dict`] reads it."""
        return {"type": self.type, **asdict(self)}


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """Always `constant`.

    Example:

    ```python
    >>> ConstantSchedule(0.5).value(1000)
    0.5
    ```
    """

    constant: float
    type: ClassVar[str] = "constant"

    def __post_init__(self):
        _finite("constant", self.constant)

    def value(self, step: int, max_steps: int | None = None) -> float:
        return float(self.constant)

    def lowest(self) -> float:
        return float(self.constant)

    def highest(self) -> float:
        return float(self.constant)


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `start` to `end` in `num_steps` steps after `delay` steps; both ends are exact."""

    start: float
    end: float
    num_steps: int | float
    delay: int | float = 0

    def __post_init__(self):
        _finite("start", self.start)
        _finite("end", self.end)
        _steps("num_steps", self.num_steps)
        _steps("delay", self.delay, zero=True)

    def value(self, step: int, max_steps: int | None = None) -> float:
        delay, num_steps = resolve_steps(self.delay, max_steps), resolve_steps(self.num_steps, max_steps)
        done = (step - delay) / max(num_steps, 1)
        if done <= 0:
            return float(self.start)
        return float(self.end) if done >= 1 else self._between(done)

    def lowest(self) -> float:
        return float(min(self.start, self.end))

    def highest(self) -> float:
        return float(max(self.start, self.end))

    def _between(self, done: float) -> float:
        raise TypeError(f"{type(self).__name__} must define `_between`.")


@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    """A straight line from `start` to `end`.

    Args:
        start (`float`): Value until `delay` steps are done.
        end (`float`): Value from `delay + num_steps` steps on.
        num_steps (`int` or `float`): Length of the ramp.
        delay (`int` or `float`, defaults to 0): Steps before it.

    Example:

    ```python
    >>> LinearSchedule(2.0, 1.0, num_steps=10).value(5)
    1.5
    ```
    """

    type: ClassVar[str] = "linear"

    def _between(self, done: float) -> float:
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    """Half a cosine from `start` to `end`: flat at both ends. Arguments as in [`LinearSchedule`].

    Example:

    ```python
    >>> CosineSchedule(2.0, 0.0, num_steps=10).value(5)
    1.0
    ```
    """

    type: ClassVar[str] = "cosine"

    def _between(self, done: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class QuarterCosineSchedule(_Ramp):
    """A quarter of a cosine, end + (start - end) cos(pi t / 2T): flat where it starts, steep where it ends. Arguments
    as in [`LinearSchedule`]. The "cosine" growth of [SMoE-Dropout](https://huggingface.co/papers/2303.01610)'s code.

    Example:

    ```python
    >>> [round(QuarterCosineSchedule(8, 16, num_steps=4).value(step)) for step in range(5)]
    [8, 9, 10, 13, 16]
    ```
    """

    type: ClassVar[str] = "quarter_cosine"

    def _between(self, done: float) -> float:
        return self.end + (self.start - self.end) * math.cos(math.pi * done / 2)


@dataclass(frozen=True)
class DecaySchedule(_Ramp):
    """The distance to `end` shrinks by a factor in equal intervals: quick at first, then slower and slower. Other
    arguments as in [`LinearSchedule`].

    end + (start - end) factor^floor(t / floor(T / intervals)), the "exponential" growth of
    [SMoE-Dropout](https://huggingface.co/papers/2303.01610)'s code. What is left of the distance after T steps is
    dropped.

    Args:
        factor (`float`, defaults to 0.99): Share of the distance that is left after an interval, in (0, 1).
        intervals (`int`, defaults to 300): Intervals in `num_steps`; one per step where there are fewer steps.

    Example:

    ```python
    >>> [round(DecaySchedule(8, 16, num_steps=1200).value(step)) for step in (0, 300, 600, 900, 1200)]
    [8, 12, 14, 15, 16]
    ```
    """

    factor: float = 0.99
    intervals: int = 300
    type: ClassVar[str] = "decay"

    def __post_init__(self):
        super().__post_init__()
        _finite("factor", self.factor)
        if not 0 < self.factor < 1:
            raise ValueError(f"`factor` must be between 0 and 1, got {self.factor}: else the end is never approached.")
        if isinstance(self.intervals, bool) or not isinstance(self.intervals, int) or self.intervals < 1:
            raise ValueError(f"`intervals` must be a whole number of at least 1, got {self.intervals!r}.")

    def value(self, step: int, max_steps: int | None = None) -> float:
        num_steps, step = resolve_steps(self.num_steps, max_steps), step - resolve_steps(self.delay, max_steps)
        if step <= 0:
            return float(self.start)
        if step >= num_steps:
            return float(self.end)
        return self.end + (self.start - self.end) * self.factor ** (step // max(num_steps // self.intervals, 1))


@dataclass(frozen=True)
class MultiStepSchedule(Schedule):
    """Values one after another in equal parts of `num_steps`; the last one stays.

    Args:
        values (`tuple[float, ...]`): In order.
        num_steps (`int` or `float`): Length of all parts together.

    Example:

    ```python
    >>> [MultiStepSchedule((1, 2, 4, 8, 16), num_steps=10).value(step) for step in (0, 1, 2, 9, 10)]
    [1.0, 1.0, 2.0, 16.0, 16.0]
    ```
    """

    values: tuple[float, ...]
    num_steps: int | float
    type: ClassVar[str] = "multi_step"

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise ValueError("a multi-step schedule needs at least one of `values`.")
        for value in self.values:
            _finite("values", value)
        _steps("num_steps", self.num_steps)

    def value(self, step: int, max_steps: int | None = None) -> float:
        part = step * len(self.values) // max(resolve_steps(self.num_steps, max_steps), 1)
        return float(self.values[min(max(part, 0), len(self.values) - 1)])

    def lowest(self) -> float:
        return float(min(self.values))

    def highest(self) -> float:
        return float(max(self.values))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "values": list(self.values), "num_steps": self.num_steps}


@dataclass(frozen=True)
class ExponentialSchedule(_Ramp):
    """The same factor in every step, from `start` to `end`, which must have the same sign. Arguments as in
    [`LinearSchedule`].

    Example:

    ```python
    >>> ExponentialSchedule(4.0, 1.0, num_steps=10).value(5)
    2.0
    ```
    """

    type: ClassVar[str] = "exponential"

    def __post_init__(self):
        super().__post_init__()
        if not self.start * self.end > 0:
            raise ValueError(
                f"an exponential schedule multiplies, so `start` and `end` must have the same sign and not be 0, got "
                f"start={self.start}, end={self.end}. Use a linear schedule to reach 0."
            )

    def _between(self, done: float) -> float:
        return self.start * (self.end / self.start) ** done


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """`before`, then `after` once `at` steps are done: a flag that is thrown once.

    Example:

    ```python
    >>> [StepSchedule(at=3).value(step) for step in (2, 3)]
    [0.0, 1.0]
    ```
    """

    at: int | float
    before: float = 0.0
    after: float = 1.0
    type: ClassVar[str] = "step"

    def __post_init__(self):
        _steps("at", self.at, zero=True)
        _finite("before", self.before)
        _finite("after", self.after)

    def value(self, step: int, max_steps: int | None = None) -> float:
        return float(self.after if step >= resolve_steps(self.at, max_steps) else self.before)

    def lowest(self) -> float:
        return float(min(self.before, self.after))

    def highest(self) -> float:
        return float(max(self.before, self.after))


@dataclass(frozen=True)
class SequenceSchedule(Schedule):
    """Schedules one after another; each counts its own steps from 0.

    Args:
        schedules (`tuple[Schedule, ...]`): In order; dicts are accepted.
        num_steps (`tuple[int | float, ...]`): Lengths of all but the last, which has no end.

    Example:

    ```python
    >>> warm = SequenceSchedule((ConstantSchedule(2.0), LinearSchedule(2.0, 1.0, num_steps=10)), num_steps=(100,))
    >>> warm.value(105)
    1.5
    ```
    """

    schedules: tuple[Schedule, ...]
    num_steps: tuple[int | float, ...]
    type: ClassVar[str] = "sequence"

    def __post_init__(self):
        schedules = tuple(s if isinstance(s, Schedule) else schedule_from_dict(s) for s in self.schedules)
        object.__setattr__(self, "schedules", schedules)
        object.__setattr__(self, "num_steps", tuple(self.num_steps))
        if not schedules or len(self.num_steps) != len(schedules) - 1:
            raise ValueError(
                f"a sequence of {len(schedules)} `schedules` needs {max(len(schedules) - 1, 0)} lengths in "
                f"`num_steps` (the last schedule has no end), got {list(self.num_steps)}."
            )
        for length in self.num_steps:
            _steps("num_steps", length)

    def value(self, step: int, max_steps: int | None = None) -> float:
        for schedule, length in zip(self.schedules, self.num_steps, strict=False):
            length = resolve_steps(length, max_steps)
            if step < length:
                return schedule.value(step, max_steps)
            step -= length
        return self.schedules[-1].value(step, max_steps)

    def lowest(self) -> float:
        return min(schedule.lowest() for schedule in self.schedules)

    def highest(self) -> float:
        return max(schedule.highest() for schedule in self.schedules)

    def to_dict(self) -> dict[str, Any]:
        schedules = [schedule.to_dict() for schedule in self.schedules]
        return {"type": self.type, "schedules": schedules, "num_steps": list(self.num_steps)}


SCHEDULES: dict[str, type[Schedule]] = {
    cls.type: cls
    for cls in (
        ConstantSchedule,
        LinearSchedule,
        CosineSchedule,
        QuarterCosineSchedule,
        DecaySchedule,
        ExponentialSchedule,
        StepSchedule,
        MultiStepSchedule,
        SequenceSchedule,
    )
}


def schedule_from_dict(description: Mapping[str, Any] | float | Schedule) -> Schedule:
    """The schedule a dict describes; a plain number is a constant.

    Args:
        description (`Mapping`): `{"type": "linear", "start": 2.0, "end": 0.5, "num_steps": 1000}`.

    Raises:
        ValueError: unknown type or argument, or a value that cannot work.
        TypeError: neither a mapping nor a number.
    """
    if isinstance(description, Schedule):
        return description
    if isinstance(description, int | float):
        return ConstantSchedule(description)
    if not isinstance(description, Mapping):
        raise TypeError(
            f"a schedule must be a dict with `type`, a number or a `Schedule`, got {type(description).__name__}."
        )
    arguments = dict(description)
    name = arguments.pop("type", None)
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name), SCHEDULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"schedule `type` must be one of {sorted(SCHEDULES)}, got {name!r}.{hint}")
    try:
        return SCHEDULES[name](**arguments)
    except TypeError as error:
        names = sorted(field.name for field in fields(SCHEDULES[name]))
        raise ValueError(f"a {name!r} schedule takes {names}, got {sorted(arguments)}.") from error


def parse_schedules(schedules: Mapping[str, Any]) -> dict[str, Schedule]:
    """Schedules by buffer name, as in `config.router_config["schedules"]`, checked.

    Args:
        schedules (`Mapping`): Name of a router's 0-dim buffer to schedule, dict or number.

    Raises:
        ValueError: names the buffer and what is wrong with its schedule.

    Example:

    ```python
    >>> parse_schedules({"temperature": {"type": "exponential", "start": 2.0, "end": 0.3, "num_steps": 1000}})
    {'temperature': ExponentialSchedule(start=2.0, end=0.3, num_steps=1000, delay=0)}
    ```
    """
    parsed = {}
    for name, description in schedules.items():
        try:
            schedule = schedule_from_dict(description)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the schedule of `{name}`: {error}") from error
        limit, allowed = LOWER_LIMITS.get(name, (-math.inf, True))
        lowest = schedule.lowest()
        if lowest < limit or (lowest == limit and not allowed):
            rule = "at least" if allowed else "above"
            raise ValueError(f"the schedule of `{name}` reaches {lowest}, but must stay {rule} {limit}.")
        parsed[name] = schedule
    return parsed


def resolve_steps(steps: int | float, max_steps: int | None) -> int:
    """A number of steps, fractions taken of `max_steps`.

    Raises:
        ValueError: `steps` is a fraction and `max_steps` is not known.
    """
    if isinstance(steps, int):
        return steps
    if not max_steps or max_steps < 0:
        raise ValueError(
            f"{steps} is a fraction of the run, but the number of steps of the run is not known. "
            "Set `max_steps`, or give the schedule whole numbers of steps."
        )
    return round(steps * max_steps)


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")


def _steps(name: str, value: Any, zero: bool = False) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= (0 if zero else 1)
    if not (whole or (isinstance(value, float) and 0 < value <= 1)):
        least = 0 if zero else 1
        raise ValueError(
            f"`{name}` must be a whole number of steps (at least {least}) or a fraction of the run in (0, 1], "
            f"got {value!r}."
        )
