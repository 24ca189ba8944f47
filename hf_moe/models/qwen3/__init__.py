"""`moe_qwen3`: Qwen3 with Mixture-of-Experts feed-forwards."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["MoeQwen3Config"]


@strict
class MoeQwen3Config(MoeConfigMixin, Qwen3Config):
    r"""Configuration of [`MoeQwen3Model`]: every field of `Qwen3Config` and of [`MoeConfigMixin`].

    Example:

    ```python
    >>> from hf_moe import MoeQwen3Config, MoeQwen3ForCausalLM
    >>> model = MoeQwen3ForCausalLM(MoeQwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    ```
    """

    model_type = "moe_qwen3"
    attribute_map = {"num_local_experts": "num_experts"}


__getattr__ = declare_backbone(__name__, MoeQwen3Config, "transformers.models.qwen3.modeling_qwen3", "Qwen3")
