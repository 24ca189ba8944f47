"""`moe_plus_plus`: MoE++ (2410.07348) on the Llama backbone."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["MoePlusPlusConfig"]


@strict
class MoePlusPlusConfig(MoeConfigMixin, LlamaConfig):
    r"""Configuration of [`MoePlusPlusModel`]: a token may spend a slot on an expert that costs nothing.

    Defaults are the paper's for its 0.6B/(8+4)E model: 8 feed-forward, 1 zero, 1 copy and 2 constant experts, top-2,
    tau 0.75, capacity factor 1.1, balance loss 0.01, gating residuals. The released checkpoint is read by
    [`~hf_moe.models.moe_plus_plus.convert_released.convert_released`].

    Note: `router_aux_loss_coef` weighs the load balancer's value, N sum eta_i f_i P_i with sum f = 1. The paper's L_b
    (Eq. 7) has sum f = K and no factor N, so it is K/N times that; for its strength to the letter, multiply by K/N.

    Args:
        num_constant_experts (`int`, *optional*, defaults to 2): `None` means max(num_experts / 4 - zero - copy, 1)
            (Eq. 10).
        router_tau (`float`, defaults to 0.75): Smaller values send more tokens to zero-computation experts: of the
            slots, tau N / (tau N + Z) go to the N feed-forward experts.
        scale_expert_input (`bool`, defaults to `False`): Multiply the input of every expert by K, as the released
            code does where `moe_feature_no_mul_topk` is off (the released 7B has it on).

    Example:

    ```python
    >>> from hf_moe import MoePlusPlusConfig, MoePlusPlusForCausalLM
    >>> model = MoePlusPlusForCausalLM(MoePlusPlusConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    ```
    """

    model_type = "moe_plus_plus"
    attribute_map = {"num_local_experts": "num_experts"}

    vocab_size: int = 65536
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    router_type: str = "gating_residual"
    num_zero_experts: int = 1
    num_copy_experts: int = 1
    num_constant_experts: int | None = 2
    router_tau: float | int = 0.75
    expert_capacity_factor: float | int | None = 1.1
    scale_expert_input: bool = False

    def __post_init__(self, **kwargs):
        if self.num_constant_experts is None:
            if not isinstance(self.num_experts, int):
                raise ValueError(
                    "`num_constant_experts=None` is derived from one number of experts, but `num_experts` is a list, "
                    f"{self.num_experts}. Give the number of constant experts."
                )
            self.num_constant_experts = max(self.num_experts // 4 - self.num_zero_experts - self.num_copy_experts, 1)
        super().__post_init__(**kwargs)


__getattr__ = declare_backbone(__name__, MoePlusPlusConfig, "transformers.models.llama.modeling_llama", "Llama")
