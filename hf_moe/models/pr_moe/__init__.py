"""`pr_moe`: PR-MoE of DeepSpeed-MoE (2201.05596) on the GPT-2 backbone."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.gpt2 import MoeGPT2Config


__all__ = ["PrMoeConfig"]


@strict
class PrMoeConfig(MoeGPT2Config):
    r"""Configuration of [`PrMoeModel`]: more experts in deeper layers (the pyramid), and beside them a dense
    feed-forward that every token passes through and one expert corrects (the residual).

    [DeepSpeed-MoE](https://huggingface.co/papers/2201.05596), Sec. 4.1. Defaults are the paper's for its 350M base: 24
    layers of width 1024, experts in every other layer, 32 of them in ten layers and 64 in the last two; top-1 with the
    probability itself as weight, capacity factor 1.0 in training with a random choice of who stays and never below 4,
    nothing dropped at evaluation; balance loss 0.01. An expert has 8h^2 + 5h parameters.

    Note: the paper says that the expert's output is added to the dense branch's; the released code weighs both with a
    learned softmax, and so does the default here (`residual_combine="sum"` for the text). Note: the released code
    starts all experts of a layer and its dense branch from the same weights, here they are drawn one by one. Note: it
    drops tokens at evaluation too (`router_config={..., "eval_capacity_factor": 1.0}`).

    Args:
        num_experts (`int` or `list[int]`, *optional*): Experts of each MoE layer. By default the pyramid of 32 and 64,
            see [`~PrMoeConfig.pyramid`].

    Example:

    ```python
    >>> from hf_moe import PrMoeConfig, PrMoeForCausalLM
    >>> config = PrMoeConfig.pyramid(4, n_embd=64, n_layer=8, n_head=4, vocab_size=1000)
    >>> config.num_experts
    [4, 4, 8, 8]
    >>> model = PrMoeForCausalLM(config)
    ```
    """

    model_type = "pr_moe"

    n_positions: int = 2048
    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 16
    initializer_range: float = 0.014
    num_experts: int | list[int] | None = None
    num_experts_per_tok: int = 1
    moe_layers: str | list[int] = "every:2"
    residual_expert: bool = True
    expert_capacity_factor: float | int | None = 1.0
    router_config: dict[str, Any] = field(
        default_factory=lambda: {"norm_topk_prob": False, "capacity_policy": "random", "min_capacity": 4}
    )

    def __post_init__(self, **kwargs):
        if self.num_experts is None:
            self.num_experts = pyramid(32, self.num_moe_layers)
        super().__post_init__(**kwargs)

    @classmethod
    def pyramid(cls, num_experts: int = 32, wide_layers: int = 2, **fields) -> "PrMoeConfig":
        """A config whose last MoE layers have twice as many experts as the others.

        Args:
            num_experts (`int`, defaults to 32): Experts of all MoE layers but the last; 64 in the paper's 1.3B base.
            wide_layers (`int`, defaults to 2): How many of the last MoE layers have twice as many.
            **fields: Fields of the config.

        Returns:
            [`PrMoeConfig`]

        Raises:
            ValueError: `wide_layers` is negative or more than there are MoE layers.

        Example:

        ```python
        >>> PrMoeConfig.pyramid(64, n_embd=2048).num_experts
        [64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 128, 128]
        ```
        """
        layers = cls(**{**fields, "num_experts": num_experts}).num_moe_layers
        if not 0 <= wide_layers <= layers:
            raise ValueError(
                f"`wide_layers` must be between 0 and the number of MoE layers ({layers}), got {wide_layers}."
            )
        return cls(**{**fields, "num_experts": pyramid(num_experts, layers, wide_layers)})


def pyramid(num_experts: int, num_layers: int, wide_layers: int = 2) -> list[int]:
    """`num_experts` in each layer, twice as many in the last `wide_layers` of them."""
    wide_layers = min(wide_layers, num_layers)
    return [num_experts] * (num_layers - wide_layers) + [2 * num_experts] * wide_layers


__getattr__ = declare_backbone(
    __name__,
    PrMoeConfig,
    "transformers.models.gpt2.modeling_gpt2",
    "GPT2",
    layer="GPT2Block",
    causal_lm="GPT2LMHeadModel",
    layers_attribute="h",
    layer_mixin="hf_moe.models.gpt2.block:MoeGPT2BlockMixin",
)
