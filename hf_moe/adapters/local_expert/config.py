"""Configuration of the local expert: what it is, what its gate reads, how the two experts are mixed."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_moe.adapters.core import MoeAdapterConfig


__all__ = ["LocalExpertConfig"]

EXPERTS = ("residual", "linear", "mlp")
POOLINGS = ("mean", "first")
MIXES = ("hard", "soft", "prob")
STAGES = ("expert", "gate", "joint")


@dataclass
class LocalExpertConfig(MoeAdapterConfig):
    """A small local expert and a gate beside the head of a frozen classifier, the global expert
    (https://huggingface.co/papers/1811.00056).

    The head gives z_G = H f. The local expert gives z_L, the gate g = sigmoid(v q + c); an input with g >= threshold
    is answered by the local expert. A fresh one answers as the global expert does.

    Leave `task_type` unset: PEFT would take the head of a classifier for itself.

    Args:
        expert (`str`, defaults to `"residual"`): `"residual"`: z_L = z_G + W f + b from zero; `"linear"`: z_L = W f
            + b, from a copy of the head; `"mlp"`: z_L = U gelu(D f + d) + u.
        expert_rank (`int`, *optional*): Rank of W in `"residual"`; full if left out.
        expert_hidden (`int`, defaults to 32): Width of `"mlp"`.
        gate_hidden (`int`, *optional*): Width of a hidden layer of the gate; none if left out.
        gate_feature_module (`str`, *optional*): Path of the module whose output q the gate reads; an early one knows
            more of what marks the user. `"input"` is the model's input itself. The head's input f if left out.
        gate_features (`int`, *optional*): Width of q, where it cannot be read off the module.
        gate_pooling (`str`, defaults to `"mean"`): How a sequence or a picture in q becomes one vector: its mean
            (padding left out) or its `"first"` position.
        mix (`str`, defaults to `"hard"`): `"hard"`: one of the two answers; `"soft"`: (1-g) z_G + g z_L; `"prob"`: the
            logarithm of the same mixture of probabilities.
        threshold (`float`, defaults to 0.5): From which g on the local expert answers, in `"hard"`; 0 is always, 2
            never. Calibration replaces it in the adapter, where it is saved.
        stage (`str`, defaults to `"joint"`): What trains: `"expert"` (the model answers with z_L while training),
            `"gate"`, or both (`"joint"`; a hard mixture is soft while training).

    Raises:
        ValueError: A value is not allowed.

    Example:
        ```python
        model = get_peft_model(classifier, LocalExpertConfig(target_modules=["classifier"]))
        ```
    """

    type_name: ClassVar[str] = "HFMOE_LOCAL_EXPERT"

    expert: str = "residual"
    expert_rank: int | None = None
    expert_hidden: int = 32
    gate_hidden: int | None = None
    gate_feature_module: str | None = None
    gate_features: int | None = None
    gate_pooling: str = "mean"
    mix: str = "hard"
    threshold: float = 0.5
    stage: str = field(default="joint")

    def validate(self) -> None:
        for name, allowed in (("expert", EXPERTS), ("gate_pooling", POOLINGS), ("mix", MIXES), ("stage", STAGES)):
            self.require(name, getattr(self, name) in allowed, f"one of {', '.join(map(repr, allowed))}")
        for name in ("expert_rank", "gate_hidden", "gate_features"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "at least 1, or left out")
        self.require("expert_hidden", self.expert_hidden >= 1, "at least 1")
        if self.expert_rank is not None and self.expert != "residual":
            raise ValueError(f"`expert_rank` is for `expert='residual'`, got `expert={self.expert!r}`.")
        self.require("threshold", 0 <= self.threshold <= 2, "between 0 (always) and 2 (never)")
        task = getattr(self.task_type, "value", self.task_type)
        if task in ("SEQ_CLS", "TOKEN_CLS"):
            raise ValueError(
                f"`task_type` must be left out, got {task!r}: PEFT would train the head itself, and the local expert "
                "would find no head to stand beside."
            )
        if self.target_parameters:
            raise ValueError(
                f"`target_parameters` must be left out, got {self.target_parameters}: the target is a head."
            )

    def frozen_containers(self) -> tuple[str, ...]:
        return {"expert": ("gate",), "gate": ("expert",), "joint": ()}[self.stage]
