"""`dynamic_moe`: dynamic routing (2403.07652) on the Llama backbone."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["DynamicMoeConfig"]


@strict
class DynamicMoeConfig(MoeConfigMixin, LlamaConfig):
    r"""Configuration of [`DynamicMoeModel`]: each token takes the fewest experts whose probabilities add up to p.

    [Dynamic routing](https://huggingface.co/papers/2403.07652). Defaults are those of the released code:
    experts in layers 0, 2, 4, ..., as wide as the dense feed-forwards between them, and p = 0.4; with the entropy
    loss that keeps the number of experts small (1e-4) and the balance loss (0.01). `num_experts` has no default in
    that code; 16 is believed to be the paper's. `router_config` holds the options of
    [`~hf_moe.routing.top_p.TopPRouter`]: `p`, `entropy_coef`, `max_experts`. Released checkpoints are read by
    [`~hf_moe.models.dynamic_moe.convert_released.convert_released`].

    `num_experts_per_tok` is not used: how many experts a token got is the number of slots in `router_indices` below
    `num_experts`.

    Example:

    ```python
    >>> from hf_moe import DynamicMoeConfig, DynamicMoeForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> model = DynamicMoeForCausalLM(DynamicMoeConfig(**sizes, num_experts=4, router_config={"p": 0.5}))
    ```
    """

    model_type = "dynamic_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    num_experts: int | list[int] = 16
    moe_layers: str | list[int] = "every:2:0"
    router_type: str = "top_p"


__getattr__ = declare_backbone(__name__, DynamicMoeConfig, "transformers.models.llama.modeling_llama", "Llama")
