"""Configuration of MoE-tuning."""

from dataclasses import dataclass, field

from .moe_tuning import moe_tuning_stage
from .sft_config import MoeSFTConfig


__all__ = ["MoeTuningConfig"]

# Peak learning rates of the paper.
LEARNING_RATES = {"projector": 1e-3, "sft": 2e-5, "moe": 2e-5}


@dataclass
class MoeTuningConfig(MoeSFTConfig):
    """[`MoeSFTConfig`] for [`moe_tuning_trainer`], with the paper's schedule as defaults: cosine, 3 % warm-up.

    Args:
        stage (`str`, defaults to `"3"`): `"1"` trains the projector, `"2"` projector and language model, `"3"` the
            feed-forwards of the sparse language model; also `"projector"`, `"sft"`, `"moe"`.
        learning_rate (`float`, *optional*): Defaults to 1e-3 in stage 1 and 2e-5 in the others.
        num_experts (`int`, defaults to 4), num_experts_per_tok (`int`, defaults to 2): Where stage 3 is given a dense
            model, what it is made into first.
        moe_layers (`str`, defaults to `"sparse"`): Likewise: `"sparse"`, `"dense"`, `"first_half"`, `"second_half"`,
            `"every:m"`, or indices, `"0,2,5"`.
        expert_capacity_factor (`float`, defaults to 1.5): Likewise; 0 drops no token.
        residual_expert (`bool`, defaults to `False`): Likewise: keep the dense feed-forward beside the experts.

    Example:

    ```python
    >>> from hf_moe.trainers import MoeTuningConfig
    >>> args = MoeTuningConfig("out", stage="1", use_cpu=True)
    >>> args.learning_rate
    0.001
    ```
    """

    stage: str = field(default="3", metadata={"help": "1 or projector, 2 or sft, 3 or moe."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate; 1e-3 in stage 1 and 2e-5 in the others by default."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or their share of all below 1."})
    num_experts: int = field(default=4, metadata={"help": "Experts per MoE layer, where stage 3 gets a dense model."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token, likewise."})
    moe_layers: str = field(
        default="sparse",
        metadata={"help": "sparse, dense, first_half, second_half, every:<m>, or indices such as 0,2,5; likewise."},
    )
    expert_capacity_factor: float = field(
        default=1.5, metadata={"help": "Capacity in training, 0 to drop nothing; likewise."}
    )
    residual_expert: bool = field(
        default=False, metadata={"help": "Keep the dense feed-forward beside the experts; likewise."}
    )

    def __post_init__(self):
        stage = moe_tuning_stage(self.stage)
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[stage]
        super().__post_init__()
