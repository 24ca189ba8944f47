"""Configuration of EvoMoE's two phases."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_moe.routing.schedules import parse_schedules
from hf_moe.upcycling.builders.diversify import Diversify

from .moe_config import MoeTrainingArguments
from .sft_config import MoeSFTConfig


__all__ = ["EvoMoEArguments", "EvoMoEConfig", "EvoMoETrainingArguments"]

SCHEDULES = ("exponential", "linear")

if TYPE_CHECKING:  # what it is mixed into has all of this
    from transformers import TrainingArguments as _Arguments
else:
    _Arguments = object


@dataclass
class EvoMoEArguments(_Arguments):
    """What [`train_evomoe`] adds to the arguments of a trainer ([EvoMoE](https://huggingface.co/papers/2112.14397)).

    Numbers of steps below 1 are fractions, of `max_steps` for `expert_steps` and of phase 2 for the others.
    `max_steps` counts both phases, and so does the learning-rate schedule.

    Note: threshold, temperatures and their schedule are those of the released code and of its re-implementation
    (2303.01610); the number of experts, the length of phase 1 and the moment of the hard phase are not published.

    Args:
        num_experts (`int`, defaults to 8): Experts from phase 2 on.
        expert_steps (`float`, defaults to 0.2): Steps of phase 1, which trains one expert per layer.
        moe_layers (`str`, defaults to `"all"`): Which layers, where the model is dense; see [`upcycle`].
        diversify (`str`, defaults to `"mask"`): How copies differ: `"mask"`, `"noise"` or `"copy"`.
        diversify_rate (`float`, defaults to 0.1): Share of weights `"mask"` draws anew.
        diversify_sigma (`float`, defaults to 0.01): Spread of `"noise"`, relative to that of a matrix.
        optimizer_moments (`str`, defaults to `"copy"`): `"copy"`: every copy gets its expert's moments; `"reset"`.
        gate_start (`str`, defaults to `"zeros"`): How routers of phase 2 start: `"zeros"`, or `"fresh"`: with first
            values of their own.
        gate_threshold (`float`, defaults to 0.001): Share of the Gumbel softmax from which on an expert is active.
        gate_weights (`str`, defaults to `"softmax"`): `"softmax"`, or `"gumbel"`: weights are those shares themselves.
        gate_selection (`str`, defaults to `"token"`): `"token"` or `"batch"`, see [`DenseToSparseRouter`].
        max_active_experts (`int`, *optional*): The most experts a token may get: the dense part of phase 2 costs
            `num_experts` times what its end costs.
        temperature_start, temperature_end (`float`, default 2.0 and 0.3): Of the gate.
        temperature_schedule (`str`, defaults to `"exponential"`): `"exponential"` or `"linear"`.
        temperature_steps (`float`, defaults to 0.5): Steps of phase 2 in which the temperature falls.
        hard_after (`float`, defaults to 0.5): Steps of phase 2 after which the gate takes one expert per token.

    Raises:
        ValueError: a value is not among those allowed, or leaves one phase without steps.
    """

    num_experts: int = field(default=8, metadata={"help": "Experts from phase 2 on."})
    expert_steps: float = field(
        default=0.2, metadata={"help": "Steps of phase 1, which trains one expert; below 1: a fraction of max_steps."}
    )
    moe_layers: str = field(default="all", metadata={"help": "Which layers become MoE layers, if the model is dense."})
    diversify: str = field(default="mask", metadata={"help": "How copies differ: mask, noise or copy."})
    diversify_rate: float = field(default=0.1, metadata={"help": "Share of weights that mask draws anew."})
    diversify_sigma: float = field(default=0.01, metadata={"help": "Spread of noise, relative to a matrix's."})
    optimizer_moments: str = field(default="copy", metadata={"help": "Moments of expanded experts: copy or reset."})
    gate_start: str = field(default="zeros", metadata={"help": "How routers of phase 2 start: zeros or fresh."})
    gate_threshold: float = field(default=0.001, metadata={"help": "Share from which on an expert is active."})
    gate_weights: str = field(default="softmax", metadata={"help": "Weights of active experts: softmax or gumbel."})
    gate_selection: str = field(default="token", metadata={"help": "Number of active experts by token or batch."})
    max_active_experts: int | None = field(default=None, metadata={"help": "The most experts a token may get."})
    temperature_start: float = field(default=2.0, metadata={"help": "Temperature of the gate at first."})
    temperature_end: float = field(default=0.3, metadata={"help": "Temperature of the gate in the end."})
    temperature_schedule: str = field(default="exponential", metadata={"help": "exponential or linear."})
    temperature_steps: float = field(
        default=0.5, metadata={"help": "Steps in which the temperature falls; below 1: a fraction of phase 2."}
    )
    hard_after: float = field(
        default=0.5,
        metadata={"help": "Steps of phase 2 after which a token gets one expert; below 1: a fraction of it."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_steps < 2:
            raise ValueError(
                f"`max_steps` must be given (at least 2): both phases are parts of it; got {self.max_steps}."
            )
        if self.num_experts < 2:
            raise ValueError(f"`num_experts` must be at least 2, got {self.num_experts}.")
        if not 1 <= self.phase_one_steps < self.max_steps:
            raise ValueError(
                f"`expert_steps={self.expert_steps:g}` gives phase 1 {self.phase_one_steps} of {self.max_steps} "
                "steps, and each phase needs one at least."
            )
        if self.temperature_schedule not in SCHEDULES:
            raise ValueError(
                f"`temperature_schedule` must be one of {list(SCHEDULES)}, got {self.temperature_schedule!r}."
            )
        if not 0 <= self.hard_after:
            raise ValueError(f"`hard_after` must not be negative, got {self.hard_after}.")
        if not 0 < self.temperature_steps:
            raise ValueError(f"`temperature_steps` must be above 0, got {self.temperature_steps}.")
        for name, allowed in (("optimizer_moments", ("copy", "reset")), ("gate_start", ("zeros", "fresh"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        if self.save_only_model:
            raise ValueError("`save_only_model` must stay False: phase 2 goes on with the optimizer of phase 1.")
        Diversify(self.diversify, self.diversify_rate, self.diversify_sigma)
        parse_schedules(self.router_fields()["router_config"].get("schedules") or {})

    @property
    def phase_one_steps(self) -> int:
        """Steps of phase 1."""
        return _count(self.expert_steps, self.max_steps)

    def router_fields(self) -> dict[str, Any]:
        """Config fields of phase 2; schedules count from the start of phase 1, as `global_step` does."""
        length = self.max_steps - self.phase_one_steps
        falling = {
            "type": self.temperature_schedule,
            "start": self.temperature_start,
            "end": self.temperature_end,
            "num_steps": max(1, _count(self.temperature_steps, length)),
            "delay": self.phase_one_steps,
        }
        hard = {"type": "step", "at": self.phase_one_steps + _count(self.hard_after, length)}
        options = {} if self.max_active_experts is None else {"max_experts": self.max_active_experts}
        return {
            "router_type": "dense_to_sparse",
            "num_experts_per_tok": 1,
            "router_config": {
                "threshold": self.gate_threshold,
                "weight_from": self.gate_weights,
                "selection": self.gate_selection,
                "temperature": self.temperature_start,
                "schedules": {"temperature": falling, "hard": hard},
                **options,
            },
        }


def _count(steps: float, whole: int) -> int:
    """A number of steps; below 1 it is a fraction of `whole`."""
    return math.ceil(steps * whole) if steps < 1 else int(steps)


@dataclass
class EvoMoETrainingArguments(EvoMoEArguments, MoeTrainingArguments):
    """[`MoeTrainingArguments`] with the fields of [`~hf_moe.trainers.evomoe_config.EvoMoEArguments`].

    Example:

    ```python
    >>> from hf_moe.trainers import EvoMoETrainingArguments
    >>> args = EvoMoETrainingArguments("out", max_steps=1000, num_experts=4, expert_steps=0.3)
    ```
    """


@dataclass
class EvoMoEConfig(EvoMoEArguments, MoeSFTConfig):
    """[`MoeSFTConfig`] with the fields of [`~hf_moe.trainers.evomoe_config.EvoMoEArguments`], for text data.

    Example:

    ```python
    >>> from hf_moe.trainers import EvoMoEConfig
    >>> args = EvoMoEConfig("out", max_steps=1000, num_experts=4, packing=True, use_cpu=True)
    ```
    """
