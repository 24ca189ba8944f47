"""Top-k routers: softmax (Mixtral, Qwen-MoE, Switch) and sigmoid (DeepSeek-V3) scores over one linear map."""

import torch

from .base import LinearRouter
from .registry import register_router


__all__ = ["SigmoidTopKRouter", "SoftmaxTopKRouter"]


@register_router("softmax_topk")
class SoftmaxTopKRouter(LinearRouter):
    """p = softmax(h W^T / temperature); the K largest, renormalised unless `norm_topk_prob=False`.

    Renormalised softmax over all experts equals softmax over the chosen logits (Mixtral, 2401.04088, Sec. 2.1).
    With `norm_topk_prob=False` it is the rule of Switch (2101.03961, Eq. 2).

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(router_type="softmax_topk", router_config={"norm_topk_prob": False})
    ```
    """


@register_router("sigmoid_topk")
class SigmoidTopKRouter(LinearRouter):
    """s = sigmoid(h W^T / temperature); the K largest of s (+ bias), divided by their sum, times the scaling factor.

    DeepSeek-V3 (2412.19437, Eqs. 12-16), with its groups (`num_expert_groups`, `top_k_groups`) and selection bias.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(router_type="sigmoid_topk", router_config={"selection_bias": True})
    ```
    """

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(router_logits / self.temperature.float())
