"""The activation gate: scores pass through a bounded or curved function before the softmax with temperature.

Shapes: T tokens, D hidden, N experts (all, zero-computation ones included).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .base import LinearRouter
from .output import RoutingContext
from .registry import register_router


__all__ = ["ActivationRouter"]

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "linear": lambda scores: scores,
}
#: f(c x) = c f(x): a factor of the temperature is a factor of weight and bias, so it cannot be learned.
HOMOGENEOUS = ("relu", "linear")


@register_router("activation")
class ActivationRouter(LinearRouter):
    """p = softmax((f(h W^T) + b) / temperature), top-K; f is a sigmoid, tanh or GELU.

    The activation dense-to-sparse gate of
    [Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?](https://huggingface.co/papers/2401.13875).
    With a linear score (`"linear"`, the baseline) or ReLU, (W, b, temperature) and (c W, c b, c temperature) are the
    same gate, which makes learning the temperature hopeless; with a curved f they are different gates.
    `num_experts_per_tok = num_experts` is the dense gate; a `temperature` schedule makes a fixed temperature fall.

    Note: the paper does not say where the bias goes; here it stays outside of f, as in its proofs' conditions on f.
    Sigmoid and tanh bound the differences of logits, so the temperature starts at 0.1 rather than 1.

    Args:
        activation (`str`, defaults to `"tanh"`): `"sigmoid"`, `"tanh"`, `"gelu"`, `"relu"` or `"linear"`.
        learn_temperature (`bool`, *optional*): Multiply the temperature by a learned positive factor. By default it
            is learned where f allows it and no schedule writes it.
        temperature (`float`, defaults to 0.1): Divides the logits.

    Example:

    ```python
    >>> from hf_moe import MoeLlamaConfig
    >>> config = MoeLlamaConfig(router_type="activation", router_config={"activation": "gelu", "temperature": 0.5})
    ```
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        activation: str = "tanh",
        learn_temperature: bool | None = None,
        temperature: float = 0.1,
        schedules: dict | None = None,
        **kwargs,
    ):
        if learn_temperature is None:
            learn_temperature = activation not in HOMOGENEOUS and "temperature" not in (schedules or {})
        super().__init__(config, layer_idx, temperature=temperature, schedules=schedules, **kwargs)
        self.activation = activation
        self.bias = nn.Parameter(torch.zeros(self.num_experts))
        self.log_temperature = nn.Parameter(torch.zeros(1)) if learn_temperature else None

    @classmethod
    def validate_config(cls, config: Any, **options) -> None:
        super().validate_config(config, **options)
        activation = options.get("activation", "tanh")
        if activation not in ACTIVATIONS:
            raise ValueError(f"`router_config['activation']` must be one of {list(ACTIVATIONS)}, got {activation!r}.")
        if not options.get("learn_temperature"):
            return
        if activation in HOMOGENEOUS:
            raise ValueError(
                f"`router_config['learn_temperature']` cannot work with `activation={activation!r}`: a factor of the "
                "temperature is undone by the same factor of weight and bias. Use 'sigmoid', 'tanh' or 'gelu', or "
                "schedule the temperature."
            )
        if "temperature" in (options.get("schedules") or {}):
            raise ValueError(
                "`router_config['schedules']` writes the temperature that `router_config['learn_temperature']` would "
                "learn. Choose one of them."
            )

    def compute_logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        activated = ACTIVATIONS[self.activation](super().compute_logits(hidden_states, context))
        return activated + self.bias.float()  # (T, N)

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        temperature = self.temperature.float()
        if self.log_temperature is not None:
            temperature = temperature * self.log_temperature.float().exp()
        return torch.softmax(router_logits / temperature, dim=-1)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in ("bias", "log_temperature"):
            parameter = getattr(self, name, None)
            if parameter is not None:
                init.zeros_(parameter)
