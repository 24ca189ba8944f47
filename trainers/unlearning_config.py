"""Configuration of unlearning."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


__all__ = ["ANCHORS", "FORGET_LOSSES", "TRAINABLE", "ExpertUnlearningConfig"]

#: Forget losses by name, with the weight of the retain term where the arguments give none.
FORGET_LOSSES = {"ga": 0.0, "graddiff": 1.0, "npo": 1.0, "rmu": 1.0}
ANCHORS = ("auto", "weights", "probs")
TRAINABLE = ("expert", "all", "all_but_routers")


@dataclass
class ExpertUnlearningConfig(TrainingArguments):
    """Arguments of [`ExpertUnlearningTrainer`]; the defaults are the paper's (SEUF, arXiv 2411.18797).

    The loss is forget term + `retain_weight` * retain term + `anchor_weight` * anchor.

    Args:
        forget_loss (`str`, defaults to `"ga"`): `"ga"` (gradient ascent, -CE_f), `"graddiff"` (-CE_f, CE_r), `"npo"`
            (negative preference optimization, CE_r) or `"rmu"` (representation misdirection).
        retain_weight (`float`, *optional*): Weight of the retain term: 0 for `"ga"`, otherwise 1, by default.
        anchor_weight (`float`, *optional*): Weight alpha of the anchor, which keeps routers on the target. By default
            1, and 0 where no router trains.
        anchor_on (`str`, defaults to `"auto"`): What is anchored: `"weights"`, the routing weights as in the paper;
            `"probs"`, the router's distribution over all experts; `"auto"`, the weights, unless the model sends tokens
            to one expert with a constant weight, whose gradient is 0.
        trainable (`str`, defaults to `"expert"`): `"expert"`: target experts (and their routers). To compare,
            `"all"`, every parameter, and `"all_but_routers"`.
        train_router (`bool`, defaults to `True`): With `trainable="expert"`, whether the routers of the targets train.
        num_target_experts (`int`, defaults to 1): Experts to choose by attribution.
        target_same_layer (`bool`, defaults to `True`): Choose all of them in the layer of the best one.
        target_experts (`dict` or JSON `str`, *optional*): The targets, instead of attribution; see
            [`~hf_moe.ExpertSliceConfig`].
        attribution_tokens (`int`, defaults to 100,000): Tokens of the forget set that attribution reads.
        max_length (`int`, defaults to 512): Longer rows of text are cut.
        npo_beta (`float`, defaults to 0.001): Inverse temperature of NPO.
        rmu_layer (`int`, *optional*): Decoder layer whose output RMU steers; that of the last target by default.
        rmu_steering (`float`, *optional*): Length c of RMU's random vector: 8000 for Qwen1.5-MoE and 32000 for
            DeepSeek-V2-Lite in the paper. By default four times the mean length of the hidden states there.
        forget_loss_target (`float`, *optional*): Loss at which the forget set counts as forgotten in
            `eval_forgetting`; that of a uniform guess, log of the vocabulary size, by default.
        learning_rate (`float`, defaults to 1e-4): As in the paper.
        per_device_train_batch_size (`int`, defaults to 16): As in the paper.

    With `load_best_model_at_end`, `metric_for_best_model` is `"balance"` by default, see
    [`ExpertUnlearningTrainer.evaluate`].

    Raises:
        ValueError: a value is not among those allowed, or two of them contradict each other.

    Example:

    ```python
    >>> from hf_moe.trainers import ExpertUnlearningConfig
    >>> args = ExpertUnlearningConfig("out", forget_loss="graddiff", max_steps=100, eval_strategy="steps")
    ```
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "target_experts"]

    forget_loss: str = field(default="ga", metadata={"help": "Forget loss: ga, graddiff, npo or rmu."})
    retain_weight: float | None = field(
        default=None, metadata={"help": "Weight of the retain term; 0 for ga, otherwise 1, by default."}
    )
    anchor_weight: float | None = field(
        default=None, metadata={"help": "Weight of the router anchor; 1 where a router trains, by default."}
    )
    anchor_on: str = field(default="auto", metadata={"help": "What is anchored: auto, weights or probs."})
    trainable: str = field(default="expert", metadata={"help": "What trains: expert, all or all_but_routers."})
    train_router: bool = field(default=True, metadata={"help": "Train the routers of the target experts."})
    num_target_experts: int = field(default=1, metadata={"help": "Experts to choose by attribution."})
    target_same_layer: bool = field(default=True, metadata={"help": "Choose all targets in one layer."})
    target_experts: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Targets instead of attribution, as JSON: {"model.layers.3.mlp": [5]}.'}
    )
    attribution_tokens: int = field(
        default=100_000, metadata={"help": "Tokens of the forget set that attribution reads."}
    )
    max_length: int = field(default=512, metadata={"help": "Longer rows of text are cut."})
    npo_beta: float = field(default=0.001, metadata={"help": "Inverse temperature of NPO."})
    rmu_layer: int | None = field(default=None, metadata={"help": "Decoder layer that RMU steers."})
    rmu_steering: float | None = field(default=None, metadata={"help": "Length of RMU's random vector."})
    forget_loss_target: float | None = field(
        default=None, metadata={"help": "Loss at which the forget set counts as forgotten."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs per device and step."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: rows are pairs."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Keys of labels."})

    def __post_init__(self):
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "balance"
        super().__post_init__()
        if isinstance(self.target_experts, str):
            self.target_experts = json.loads(self.target_experts)
        for name, allowed in (
            ("forget_loss", tuple(FORGET_LOSSES)),
            ("anchor_on", ANCHORS),
            ("trainable", TRAINABLE),
            ("remove_unused_columns", (False,)),
        ):
            if getattr(self, name) not in allowed:
                choice = ", ".join(map(repr, allowed))
                raise ValueError(f"`{name}` must be one of {choice}, got {getattr(self, name)!r}.")
        for name in ("retain_weight", "anchor_weight"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        for name in ("num_target_experts", "attribution_tokens", "max_length", "npo_beta", "rmu_steering"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.trainable != "expert" and self.anchor_weight:
            raise ValueError(
                f"`anchor_weight` needs `trainable='expert'`, got {self.trainable!r}: the anchor ties a router to the "
                "target experts. Leave it out, or set it to 0."
            )
        if self.trainable == "expert" and not self.train_router and self.anchor_weight:
            raise ValueError(
                "`anchor_weight` has no gradient with `train_router=False`: no anchored router trains. Leave it out, "
                "or set it to 0."
            )
        options: Any = self.activation_checkpointing_kwargs or {}
        reentrant = options.get("use_reentrant")
        if self.trainable == "expert" and self.activation_checkpointing and reentrant:
            raise ValueError(
                "`activation_checkpointing_kwargs={'use_reentrant': True}` would silently drop the anchor's gradient "
                "and, with everything below the target frozen, the target's too. Use `{'use_reentrant': False}`."
            )

    @property
    def retain_coefficient(self) -> float:
        """Weight of the retain term that is used."""
        return FORGET_LOSSES[self.forget_loss] if self.retain_weight is None else self.retain_weight

    @property
    def anchor_coefficient(self) -> float:
        """Weight of the anchor that is used."""
        if self.anchor_weight is None:
            return float(self.trainable == "expert" and self.train_router)
        return self.anchor_weight
