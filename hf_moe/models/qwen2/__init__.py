"""`moe_qwen2`: Qwen2 with Mixture-of-Experts feed-forwards."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from hf_moe.models.backbone import declare_backbone
from hf_moe.models.configuration import MoeConfigMixin


__all__ = ["MoeQwen2Config"]


@strict
class MoeQwen2Config(MoeConfigMixin, Qwen2Config):
    r"""Configuration of [`MoeQwen2Model`]: every field of `Qwen2Config` and of [`MoeConfigMixin`].

    Example:

    ```python
    >>> from hf_moe import MoeQwen2Config, MoeQwen2ForCausalLM
    >>> model = MoeQwen2ForCausalLM(MoeQwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    ```
    """

    model_type = "moe_qwen2"
    attribute_map = {"num_local_experts": "num_experts"}


__getattr__ = declare_backbone(__name__, MoeQwen2Config, "transformers.models.qwen2.modeling_qwen2", "Qwen2")
