"""Settings of MoSA, the mixture of sparse adapters."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_moe.adapters.core import MoeAdapterConfig


__all__ = ["MosaConfig"]

_STYLES: dict[str, dict[str, Any]] = {
    "parallel": {"r": 64, "scale": 0.1, "dropout": 0.1, "activation": "gelu", "layernorm": True, "adapter_bias": True},
    "pfeiffer": {"r": 64, "scale": 0.1, "dropout": 0.1, "activation": "relu", "layernorm": True, "adapter_bias": True},
    "houlsby": {"r": 64, "scale": 0.1, "dropout": 0.1, "activation": "silu", "layernorm": False, "adapter_bias": True},
    "lora": {"r": 16, "scale": 1.0, "dropout": 0.0, "activation": None, "layernorm": False, "adapter_bias": False},
}
_SHARES = ("down", "up", "none")
_INPUTS = (None, "block", "residual")


@dataclass
class MosaConfig(MoeAdapterConfig):
    r"""Mixture of sparse adapters: an adapter that is trained as M disjoint sparse experts and used as one.

    The entries of the adapter's weights are dealt out to M groups once. In training every call draws one group per
    adapter, and only its entries are active and get gradients; otherwise the mean of the experts,
    W0 + (V - W0) / M, acts as one plain adapter. Fields that are left out follow from `style`.

    Args:
        num_experts (`int`, defaults to 4): M, up to 256. With 1 it is the plain adapter.
        style (`str`, defaults to `"parallel"`): `"parallel"`: beside the feed-forward block, added to its output (as
            AdaptFormer). `"pfeiffer"`: on the output of the feed-forward block. `"houlsby"`: on the outputs of
            attention and feed-forward block. `"lora"`: a low-rank addition to the weights of linear layers, which
            can be merged into them.
        share (`str`, defaults to `"down"`): The projection that all experts share and that always trains: `"down"`,
            `"up"`, or `"none"`.
        r (`int`, *optional*): Width of the bottleneck; 64, and 16 for `"lora"`.
        scale (`float`, *optional*): Factor of the adapter; 0.1, and 1.0 for `"lora"`.
        dropout (`float`, *optional*): 0.1 inside the bottleneck; 0.0 for `"lora"`, where it acts on the input.
        activation (`str`, *optional*): By style `"gelu"`, `"relu"`, `"silu"`; `"lora"` has none.
        layernorm (`bool`, *optional*): A trained layer norm before the bottleneck; `"parallel"` and `"pfeiffer"`.
        adapter_bias (`bool`, *optional*): Biases; of a split projection every expert has its own. All but `"lora"`.
        adapter_input (`str`, *optional*): What `"parallel"` reads. `"block"`: what the adapted module reads.
            `"residual"`: the residual stream before the block's norm, as in the paper; the norm is found by its name.
            Left out, it is `"block"`, but `"residual"` when the targets are left out too and the feed-forward is no
            module (BERT, RoBERTa, OPT).
        merge_scale (`float`, defaults to 1.0): Factor of the merged update; `num_experts` gives the union of the
            experts instead of their mean.
        mask_seed (`int`, defaults to 0): Of the partition. It is saved with the adapter all the same.
        consistency_weight (`float`, defaults to 1.0): beta, for [`~hf_moe.trainers.MosaTrainer`].
        second_ce_weight (`float`, defaults to 0.0): alpha, for [`~hf_moe.trainers.MosaTrainer`].
        feature_weight (`float`, defaults to 0.0): Weight of the distance of block outputs, for the same trainer; the
            reference's own value is 0.01 where it is on.
        draw_seed (`int`, *optional*): For [`~hf_moe.trainers.MosaTrainer`]: all processes draw the same experts, given
            by this seed, the step and the pass. Left out, each process draws from torch's generator.
        target_modules: The feed-forward blocks (and the attention blocks for `"houlsby"`, query and value projections
            for `"lora"`) of common architectures when left out. Other styles than `"lora"` adapt any linear layer or
            block.
        target_parameters: Stacked experts and other parameters, for `"lora"` without dropout.

    Raises:
        ValueError: A field has a value it cannot have, or that the style cannot use.

    Example:
        ```python
        model = get_peft_model(ViTForImageClassification(config), MosaConfig(r=16, modules_to_save=["classifier"]))
        ```

    Paper: MoSA, [arXiv 2312.02923](https://arxiv.org/abs/2312.02923).
    """

    type_name: ClassVar[str] = "HFMOE_MOSA"

    num_experts: int = 4
    style: str = "parallel"
    share: str = "down"
    r: int | None = None
    scale: float | None = None
    dropout: float | None = None
    activation: str | None = None
    layernorm: bool | None = None
    adapter_bias: bool | None = None
    adapter_input: str | None = None
    merge_scale: float = 1.0
    mask_seed: int = 0
    consistency_weight: float = 1.0
    second_ce_weight: float = 0.0
    feature_weight: float = 0.0
    draw_seed: int | None = None

    def validate(self) -> None:
        """See the class."""
        self.require("style", self.style in _STYLES, f"one of {list(_STYLES)}")
        for name, value in _STYLES[self.style].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.require("share", self.share in _SHARES, f"one of {list(_SHARES)}")
        self.require("adapter_input", self.adapter_input in _INPUTS, "'block' or 'residual'")
        self.require("num_experts", 1 <= self.num_experts <= 256, "between 1 and 256")
        self.require("r", (self.r or 0) >= 1, "at least 1")
        self.require("dropout", 0.0 <= (self.dropout or 0.0) < 1.0, "at least 0 and less than 1")
        self.require("merge_scale", self.merge_scale > 0, "positive")
        self.require("consistency_weight", self.consistency_weight >= 0, "at least 0")
        self.require("second_ce_weight", self.second_ce_weight >= 0, "at least 0")
        self.require("feature_weight", self.feature_weight >= 0, "at least 0")
        if self.num_experts == 1:
            self.require("merge_scale", self.merge_scale == 1.0, "1.0 with `num_experts=1`, as nothing is merged")
        if self.style != "parallel" and self.adapter_input == "residual":
            raise ValueError(
                f"`adapter_input='residual'` is for `style='parallel'`, got `style={self.style!r}`, which reads the "
                f"{'input of the linear layer' if self.style == 'lora' else 'output of the block'}. Leave it out."
            )
        if self.style == "lora":
            for name in ("layernorm", "adapter_bias", "activation"):
                if getattr(self, name):
                    raise ValueError(
                        f"`{name}` cannot be used with `style='lora'`, got {getattr(self, name)!r}: the adapter would "
                        "no longer be an addition to the weight. Leave it out, or use `style='parallel'`."
                    )
        elif self.target_parameters:
            raise ValueError(
                f"`target_parameters` needs `style='lora'`, got `style={self.style!r}`: a bottleneck is no addition "
                "to a parameter."
            )
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"`dropout` must be 0 with `target_parameters`, got {self.dropout}: the parameter is adapted, not the "
                "input."
            )
