"""The softmax-gated Gaussian mixture of experts: its density, and the model that holds its parameters.

Shapes: B observations, d inputs, k experts of the mixture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from hf_moe.models.softmax_gaussian_moe import SoftmaxGaussianMoEConfig


__all__ = ["SoftmaxGaussianMoEForRegression", "SoftmaxGaussianMoEOutput"]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "linear": lambda scores: scores,
    "relu": F.relu,
    "square": torch.square,
}


@dataclass
class SoftmaxGaussianMoEOutput(ModelOutput):
    """What [`SoftmaxGaussianMoEForRegression`] returns.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): -mean log p(y | x), where labels were given.
        mean (`torch.Tensor` of shape `(B,)`): E[y | x].
        gates (`torch.Tensor` of shape `(B, k)`): pi(x).
        expert_means (`torch.Tensor` of shape `(B, k)`): a_i^T x + b_i.
        expert_variances (`torch.Tensor` of shape `(B, k)`): nu_i, the same in every row.
    """

    loss: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    expert_means: torch.Tensor | None = None
    expert_variances: torch.Tensor | None = None


class SoftmaxGaussianMoEForRegression(PreTrainedModel):
    """p(y | x) = sum_i pi_i(x) N(y | a_i^T x + b_i, nu_i), in float64.

    The density of [2305.03288](https://huggingface.co/papers/2305.03288) (softmax gate),
    [2309.13850](https://huggingface.co/papers/2309.13850) (top-K) and
    [2401.13875](https://huggingface.co/papers/2401.13875) (temperature, activation). Parameters: `gate_weight` beta1
    `(k, d)`, `gate_bias` beta0 `(k,)`, `weight` a `(k, d)`, `bias` b `(k,)`, `log_variance` log nu `(k,)`, and
    `log_temperature` `(1,)`, relative to the config's, where it is learned.

    Works with the `Trainer` on columns `x` and `labels`. Full-batch maximum likelihood is in `hf_moe.statistics`.

    Args:
        config ([`SoftmaxGaussianMoEConfig`]): Sizes and gate.

    Example:

    ```python
    >>> model = SoftmaxGaussianMoEForRegression(SoftmaxGaussianMoEConfig(num_components=2, input_size=1))
    >>> model(x, labels=y).loss  # -mean log p
    ```
    """

    config_class = SoftmaxGaussianMoEConfig
    base_model_prefix = "model"
    main_input_name = "x"

    def __init__(self, config: SoftmaxGaussianMoEConfig):
        super().__init__(config)
        # `from_pretrained(folder, top_k=...)` sets fields after the config was checked.
        config.validate_architecture()
        k, d = config.num_components, config.input_size
        # Not torch's default: estimates whose error falls as n^(-1/2) need the digits of float64.
        dtype: Any = config.dtype
        self.gate_weight = nn.Parameter(torch.empty(k, d, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(k, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(k, d, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(k, dtype=dtype))
        self.log_variance = nn.Parameter(torch.empty(k, dtype=dtype))
        self.log_temperature = nn.Parameter(torch.empty(1, dtype=dtype)) if config.learn_temperature else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:
            return
        for parameter in (self.gate_weight, self.weight, self.bias):
            init.normal_(parameter, std=self.config.initializer_range)
        for parameter in (self.gate_bias, self.log_variance, self.log_temperature):
            if parameter is not None:
                init.zeros_(parameter)

    @property
    def variance(self) -> torch.Tensor:
        """nu `(k,)`, never below `config.min_variance`."""
        return self.log_variance.exp().clamp(min=self.config.min_variance)

    @property
    def temperature(self) -> torch.Tensor:
        """The temperature, 0-dimensional."""
        if self.log_temperature is None:
            return self.gate_bias.new_tensor(self.config.temperature)
        return self.config.temperature * self.log_temperature.exp().squeeze(0)

    def activation(self, inner: torch.Tensor) -> torch.Tensor:
        """f, elementwise; the identity but for the activation gate."""
        return FUNCTIONS[self.config.activation if self.config.gate == "activation" else "linear"](inner)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """What the softmax is taken of, before any selection: `(B, d)` to `(B, k)`."""
        return (self.activation(x @ self.gate_weight.T) + self.gate_bias) / self.temperature

    def log_gates(self, x: torch.Tensor) -> torch.Tensor:
        """log pi `(B, k)`; -inf where the top-K gate left an expert out."""
        scores = self.scores(x)
        if self.config.gate == "top_k" and self.config.top_k < self.config.num_components:
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept.scatter_(-1, scores.topk(self.config.top_k, dim=-1).indices, True)
            scores = scores.masked_fill(~kept, -math.inf)
        return scores.log_softmax(dim=-1)

    def expert_means(self, x: torch.Tensor) -> torch.Tensor:
        """a_i^T x + b_i, `(B, k)`."""
        return F.linear(x, self.weight, self.bias)

    def expert_log_density(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """log N(y | a_i^T x + b_i, nu_i): `(B, d)` and `(B,)` to `(B, k)`."""
        variance = self.variance
        squares = (y.unsqueeze(-1) - self.expert_means(x)).square()
        return -0.5 * (squares / variance + variance.log() + math.log(2 * math.pi))

    def log_joint(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """log pi_i(x) + log N(y | ...), `(B, k)`: its softmax are the responsibilities."""
        x = self._inputs(x)
        y = y.to(x).reshape(-1)
        return self.log_gates(x) + self.expert_log_density(x, y)

    def log_density(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """log p(y | x), `(B,)`."""
        return self.log_joint(x, y).logsumexp(dim=-1)

    @torch.no_grad()
    def sample(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One y for each row of x, `(B,)`, drawn from the model.

        Args:
            x (`torch.Tensor` of shape `(B, d)`): Inputs.
            generator (`torch.Generator`, *optional*): On the model's device.
        """
        x = self._inputs(x)
        expert = torch.multinomial(self.log_gates(x).exp(), 1, generator=generator)
        noise = torch.randn(len(x), dtype=x.dtype, device=x.device, generator=generator)
        mean = self.expert_means(x).gather(-1, expert).squeeze(-1)
        return mean + self.variance[expert.squeeze(-1)].sqrt() * noise

    @can_return_tuple
    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> SoftmaxGaussianMoEOutput:
        """Density and its parts.

        Args:
            x (`torch.Tensor` of shape `(B, d)`, or `(B,)` where d is 1): Inputs.
            labels (`torch.Tensor` of shape `(B,)` or `(B, 1)`, *optional*): y.
            return_dict (`bool`, *optional*): `False` for a tuple.

        Returns:
            [`SoftmaxGaussianMoEOutput`]

        Raises:
            ValueError: inputs of another width, or another number of labels.
        """
        x = self._inputs(x)
        gates, means = self.log_gates(x).exp(), self.expert_means(x)
        loss = None
        if labels is not None:
            labels = labels.to(x).reshape(-1)
            if len(labels) != len(x):
                raise ValueError(f"`labels` must have one number for each of the {len(x)} inputs, got {len(labels)}.")
            loss = -self.log_density(x, labels).mean()
        return SoftmaxGaussianMoEOutput(
            loss=loss,
            mean=(gates * means).sum(-1),
            gates=gates,
            expert_means=means,
            expert_variances=self.variance.expand_as(means),
        )

    def _inputs(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 1 and self.config.input_size == 1:
            x = x.unsqueeze(-1)
        if x.dim() != 2 or x.shape[-1] != self.config.input_size:
            raise ValueError(f"`x` must have shape (B, {self.config.input_size}), got {tuple(x.shape)}.")
        return x.to(self.weight)

    def save_pretrained(self, save_directory, *args, code: str | None = "shim", **kwargs):
        """As in transformers; also writes the one-line shim through which the checkpoint loads with
        `trust_remote_code=True` where the plugin is installed but not imported.

        Args:
            code (`str`, *optional*, defaults to `"shim"`): `"shim"` or `None` for no code at all.
        """
        from hf_moe.hub import attach_shim

        attach_shim(self, save_directory, code=code, is_main_process=kwargs.get("is_main_process", True))
        return super().save_pretrained(save_directory, *args, **kwargs)
