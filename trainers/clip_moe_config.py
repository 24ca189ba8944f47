"""Configuration of CLIP-MoE's training from a dense CLIP."""

from dataclasses import dataclass, field

from .contrastive_config import ContrastiveConfig


__all__ = ["EXPERTS", "ClipMoeConfig"]

#: Where experts come from.
EXPERTS = ("mcl", "copies")


@dataclass
class ClipMoeConfig(ContrastiveConfig):
    """[`ContrastiveConfig`] of every stage of [`train_clip_moe`], with what makes the mixture.

    `learning_rate`, `weight_decay`, `num_train_epochs` and `max_steps` are those of each stage that makes an expert.

    Args:
        experts (`str`, defaults to `"mcl"`): `"mcl"`, the paper's stages of contrastive learning; `"copies"`, copies
            of the dense feed-forwards, which the released code makes by default, trained in the tuning.
        num_experts (`int`, defaults to 4): The dense model's feed-forwards and those of `num_experts - 1` stages.
        num_experts_per_tok (`int`, defaults to 2): Experts per token.
        num_clusters (`int`, defaults to 3): Clusters per modality and stage. A stage has their square times as many
            as the one before, and those that do not fill a batch are left out: choose fewer for small data.
        vision_layers, text_layers (`str`, default `"all"`): MoE layers of the towers: `"all"`, `"none"`,
            `"first_half"`, `"second_half"`, `"every:m"`, or indices, `"6,8,10"`.
        expert_dropout (`float`, defaults to 0.1): Inside the experts, in the tuning.
        stretch_positions (`bool`, defaults to `False`): First make CLIP read longer captions (248 tokens instead of
            77), see [`~hf_moe.upcycling.stretch_text_positions`].
        router_learning_rate (`float`, defaults to 1e-6): Of the tuning.
        router_weight_decay (`float`, defaults to 0.01): Of the tuning of routers alone.
        tuning_steps (`int`, *optional*): Steps of the tuning; as many as of a stage by default.
        image_column, text_column (`str`, default `"image"` and `"text"`): Columns of the data.

    Raises:
        ValueError: a value out of range, or `trained`, which is chosen by the stage.

    Example:

    ```python
    >>> from hf_moe.trainers import ClipMoeConfig
    >>> args = ClipMoeConfig("out", num_experts=3, num_clusters=2, use_cpu=True)
    ```
    """

    experts: str = field(default="mcl", metadata={"help": "mcl (stages of contrastive learning) or copies."})
    num_experts: int = field(default=4, metadata={"help": "Experts per MoE layer, the dense feed-forward included."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token."})
    num_clusters: int = field(default=3, metadata={"help": "Clusters per modality and stage."})
    vision_layers: str = field(
        default="all",
        metadata={"help": "all, none, first_half, second_half, every:<m>, or indices such as 6,8,10."},
    )
    text_layers: str = field(default="all", metadata={"help": "Likewise, of the text tower."})
    expert_dropout: float = field(default=0.1, metadata={"help": "Dropout inside the experts, in the tuning."})
    stretch_positions: bool = field(default=False, metadata={"help": "First make CLIP read longer captions."})
    router_learning_rate: float | None = field(default=1e-6, metadata={"help": "Learning rate of routers."})
    router_weight_decay: float = field(default=0.01, metadata={"help": "Weight decay where routers alone are tuned."})
    tuning_steps: int | None = field(
        default=None, metadata={"help": "Steps of the tuning; as many as of a stage by default."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    text_column: str = field(default="text", metadata={"help": "Column of the captions."})

    def __post_init__(self):
        if self.experts not in EXPERTS:
            raise ValueError(f"`experts` must be one of {list(EXPERTS)}, got {self.experts!r}.")
        if self.num_experts < 2:
            raise ValueError(f"`num_experts` must be at least 2, got {self.num_experts}.")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must be from 1 to `num_experts` ({self.num_experts}), "
                f"got {self.num_experts_per_tok}."
            )
        if self.num_clusters < 2:
            raise ValueError(f"`num_clusters` must be at least 2, got {self.num_clusters}.")
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"`expert_dropout` must be at least 0 and below 1, got {self.expert_dropout}.")
        if self.tuning_steps is not None and self.tuning_steps < 1:
            raise ValueError(f"`tuning_steps` must be at least 1, or left out, got {self.tuning_steps}.")
        if self.trained != "feed_forward":
            raise ValueError(
                f"`trained={self.trained!r}` must be left out: the stages train feed-forwards, the tuning routers "
                "(with `experts='copies'` experts too)."
            )
        super().__post_init__()
