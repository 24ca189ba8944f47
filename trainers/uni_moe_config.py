"""Configuration of Uni-MoE's progressive training."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .moe_config import MoeTrainingArguments


__all__ = ["MODALITIES", "UniMoeTrainingArguments", "parse_mix", "parse_phase"]

#: Names of the phases, in their order; their numbers are 1, 2 and 3.
PHASES = ("alignment", "experts", "joint")
#: What a row of the data may hold beside its prompt; `"text"` are the rows with nothing else.
MODALITIES = ("image", "video", "speech", "audio", "text")
CONNECTORS = ("image", "speech", "audio")


def parse_phase(phase: int | str) -> tuple[str, ...]:
    """The phases that an option asks for.

    Args:
        phase (`int` or `str`): 1, 2, 3, `"alignment"`, `"experts"`, `"joint"` or `"all"`.

    Returns:
        `tuple[str, ...]`: Names out of `("alignment", "experts", "joint")`.

    Raises:
        ValueError: another value.
    """
    name = str(phase)
    if name == "all":
        return PHASES
    if name in ("1", "2", "3") and not isinstance(phase, bool):
        name = PHASES[int(name) - 1]
    if name not in PHASES:
        raise ValueError(f"`phase` must be 'all', 1, 2 or 3, or one of {list(PHASES)}, got {phase!r}.")
    return (name,)


def parse_mix(mix: str) -> frozenset[str]:
    """The modalities of an expert's data: `"image+text"` are rows with images, and rows of text alone.

    Args:
        mix (`str`): Modalities joined by `+`.

    Returns:
        `frozenset[str]`

    Raises:
        ValueError: something that is no modality.
    """
    parts = [part.strip() for part in mix.split("+")]
    unknown = [part for part in parts if part not in MODALITIES]
    if unknown:
        raise ValueError(f"`expert_data` must name some of {list(MODALITIES)}, joined by '+', got {mix!r}.")
    return frozenset(parts)


@dataclass
class UniMoeTrainingArguments(MoeTrainingArguments):
    """Arguments of [`train_uni_moe`]: [`MoeTrainingArguments`], with the schedule of the released code of
    [Uni-MoE](https://huggingface.co/papers/2405.11273) as defaults: 4e-5, cosine, 3 % warm-up, no weight decay.

    `max_steps` and `num_train_epochs` count for each run by itself: one per connector in phase 1, one per expert in
    phase 2, one in phase 3.

    Args:
        phase (`str`, defaults to `"all"`): `"1"` or `"alignment"`, `"2"` or `"experts"`, `"3"` or `"joint"`, or
            `"all"` in a row.
        connectors (`list[str]`, *optional*): Phase 1: which connectors are aligned, in which order, of `"image"`
            (videos too), `"speech"` and `"audio"`; all that the model has by default.
        expert_data (`list[str]`, *optional*): Phase 2: one expert per entry, which says what rows it is tuned on:
            modalities joined by `+`, such as `image+text` or `speech+image`; rows that hold nothing else are taken.
            By default one expert per modality that the model reads. In phase 3, what `expert_models` were tuned on.
        expert_models (`list[str]`, *optional*): Phase 3: models whose experts are put together first
            ([`combine_uni_moe`]), where phase 2 ran elsewhere.
        num_experts_per_tok (`int`, defaults to 2): Experts each token is sent to once they are together.
        adapter_rank (`int`, defaults to 8), adapter_alpha (`int`, defaults to 16): LoRA of phase 3.
        merge_adapter (`bool`, defaults to `True`): Whether phase 3 ends with a whole model; otherwise with an adapter
            for the model in the folder `combined`.
        alignment_steps, expert_steps, joint_steps (`int`, *optional*): `max_steps` of the runs of one phase.
        alignment_learning_rate, joint_learning_rate (`float`, *optional*): `learning_rate` of the runs of one phase.

    Raises:
        ValueError: a value is not among those allowed.

    Example:

    ```python
    >>> from hf_moe.trainers import UniMoeTrainingArguments
    >>> args = UniMoeTrainingArguments("out", expert_data=["image+text", "speech+image"], max_steps=1000)
    ```
    """

    learning_rate: float = field(default=4e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or their share of all below 1."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: media are read from the columns of the data."}
    )
    phase: str = field(default="all", metadata={"help": "1 or alignment, 2 or experts, 3 or joint, or all."})
    connectors: list[str] | None = field(
        default=None, metadata={"help": "Phase 1: image, speech, audio; all that the model has by default."}
    )
    expert_data: list[str] | None = field(
        default=None,
        metadata={"help": "Phase 2: one expert per entry: modalities joined by +, such as image+text speech+image."},
    )
    expert_models: list[str] | None = field(
        default=None, metadata={"help": "Phase 3: models whose experts are put together first."}
    )
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token, once they are together."})
    adapter_rank: int = field(default=8, metadata={"help": "Rank of the LoRA of phase 3."})
    adapter_alpha: int = field(default=16, metadata={"help": "Scale of the LoRA of phase 3, times 1 / rank."})
    merge_adapter: bool = field(default=True, metadata={"help": "Whether phase 3 ends with a whole model."})
    alignment_steps: int | None = field(default=None, metadata={"help": "max_steps of each run of phase 1."})
    expert_steps: int | None = field(default=None, metadata={"help": "max_steps of each run of phase 2."})
    joint_steps: int | None = field(default=None, metadata={"help": "max_steps of phase 3."})
    alignment_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of phase 1."})
    joint_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of phase 3."})

    def __post_init__(self):
        super().__post_init__()
        phases = parse_phase(self.phase)
        self._check_names("connectors", self.connectors, CONNECTORS)
        if self.expert_data is not None:
            if not self.expert_data:
                raise ValueError("`expert_data` must have an entry for each expert, got [].")
            for mix in self.expert_data:
                parse_mix(mix)
        if self.expert_models is not None and phases != ("joint",):
            raise ValueError(
                f"`expert_models` are put together in phase 3, but `phase` is {self.phase!r}. Use `phase='joint'`, or "
                "leave them out."
            )
        if self.expert_models and self.expert_data and len(self.expert_models) != len(self.expert_data):
            raise ValueError(
                f"`expert_data` must say of each of the {len(self.expert_models)} `expert_models` what it was tuned "
                f"on, got {self.expert_data}. Leave it out to take the connectors of the first."
            )
        for name in ("num_experts_per_tok", "adapter_rank", "adapter_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("alignment_steps", "expert_steps", "joint_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"`{name}` must be at least 1, got {steps}.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must stay False: media are read from the columns of the data.")
        if self.resume_from_checkpoint is not None and str(self.resume_from_checkpoint) not in ("True", "False"):
            raise ValueError(
                "`resume_from_checkpoint` must be True or left out, since there are several runs: checkpoints are "
                f"looked for in `output_dir`; got {self.resume_from_checkpoint!r}."
            )

    @staticmethod
    def _check_names(name: str, given: Sequence[str] | None, allowed: Sequence[str]) -> None:
        if given is not None and (not given or set(given) - set(allowed) or len(set(given)) < len(given)):
            raise ValueError(f"`{name}` must be some of {list(allowed)}, each once, got {list(given)}.")

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases to go through."""
        return parse_phase(self.phase)

    @property
    def resumes(self) -> bool:
        """Whether a run that was interrupted goes on."""
        return str(self.resume_from_checkpoint) == "True"
