"""The parameters of a softmax-gated Gaussian mixture of experts as plain tensors.

Shapes: k experts of the mixture, d inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from hf_moe.models.softmax_gaussian_moe import SoftmaxGaussianMoEConfig
from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression


__all__ = ["GaussianMoEParameters"]


@dataclass(frozen=True, eq=False)
class GaussianMoEParameters:
    """p(y | x) = sum_i pi_i(x) N(y | weight_i^T x + bias_i, variance_i), gate scores gate_weight_i^T x + gate_bias_i.

    Lists are accepted and become float64 tensors on the CPU.

    Args:
        gate_weight (`torch.Tensor` of shape `(k, d)`): beta1.
        gate_bias (`torch.Tensor` of shape `(k,)`): beta0.
        weight (`torch.Tensor` of shape `(k, d)`): a.
        bias (`torch.Tensor` of shape `(k,)`): b.
        variance (`torch.Tensor` of shape `(k,)`): nu; not the standard deviation.
        temperature (`float`, defaults to 1.0): Divides the gate's scores.

    Raises:
        ValueError: shapes that do not belong together, a number that is not finite, a variance or temperature <= 0.

    Example:

    ```python
    >>> GaussianMoEParameters([[25.0], [0.0]], [-8.0, 0.0], [[-20.0], [20.0]], [15.0, -5.0], [0.3, 0.4])
    ```
    """

    gate_weight: torch.Tensor
    gate_bias: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    variance: torch.Tensor
    temperature: float = 1.0

    def __post_init__(self):
        for name in TENSORS:
            tensor = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu").detach().clone()
            object.__setattr__(self, name, tensor)
            if not tensor.isfinite().all():
                raise ValueError(f"`{name}` must be finite, got {tensor.tolist()}.")
        object.__setattr__(self, "temperature", float(self.temperature))
        if self.weight.dim() != 2:
            raise ValueError(f"`weight` must have shape (k, d), got {tuple(self.weight.shape)}.")
        k = len(self.weight)
        for name in TENSORS:
            expected = self.weight.shape if name in ("gate_weight", "weight") else (k,)
            if getattr(self, name).shape != expected:
                raise ValueError(
                    f"`{name}` must have shape {tuple(expected)} beside a `weight` of {tuple(self.weight.shape)}, got "
                    f"{tuple(getattr(self, name).shape)}."
                )
        if not (self.variance > 0).all():
            raise ValueError(f"`variance` must be positive, got {self.variance.tolist()}.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"`temperature` must be a positive number, got {self.temperature}.")

    @property
    def num_components(self) -> int:
        """k."""
        return len(self.weight)

    @property
    def input_size(self) -> int:
        """d."""
        return self.weight.shape[1]

    def permuted(self, order: Sequence[int] | torch.Tensor) -> "GaussianMoEParameters":
        """The experts `order` of this mixture, in that order; an expert may appear several times."""
        index = torch.as_tensor(order)
        return replace(self, **{name: getattr(self, name)[index] for name in TENSORS})

    def shifted(self, gate_weight: torch.Tensor, gate_bias: torch.Tensor | float) -> "GaussianMoEParameters":
        """With `gate_weight` `(d,)` and `gate_bias` added to those of every expert.

        Of a gate with linear scores that is the same density, of one with an activation if `gate_weight` is zero.
        """
        return replace(self, gate_weight=self.gate_weight + gate_weight, gate_bias=self.gate_bias + gate_bias)

    @classmethod
    def of(cls, model: SoftmaxGaussianMoEForRegression) -> "GaussianMoEParameters":
        """The parameters of a model."""
        tensors = {name: getattr(model, name) for name in TENSORS}
        return cls(**tensors, temperature=float(model.temperature.detach()))

    @torch.no_grad()
    def write_to(self, model: SoftmaxGaussianMoEForRegression) -> None:
        """Sets the parameters of a model of the same size; top-K and activation are the model's own.

        Raises:
            ValueError: another size, a variance below its `min_variance`, or a temperature that is not its own and not
                learned.
        """
        config = model.config
        if (config.num_components, config.input_size) != (self.num_components, self.input_size):
            raise ValueError(
                f"These parameters have {self.num_components} components of {self.input_size} inputs; `model` has "
                f"{config.num_components} of {config.input_size}."
            )
        if self.variance.min() < config.min_variance:
            raise ValueError(
                f"`variance` {self.variance.tolist()} is below the model's `min_variance` ({config.min_variance}). "
                "Lower `min_variance`."
            )
        if model.log_temperature is None:
            if self.temperature != config.temperature:
                raise ValueError(
                    f"`temperature` {self.temperature} is not the model's, {config.temperature}, which it does not "
                    "learn. Set it in the model's config."
                )
        else:
            model.log_temperature.fill_(math.log(self.temperature / config.temperature))
        for name in ("gate_weight", "gate_bias", "weight", "bias"):
            getattr(model, name).copy_(getattr(self, name))
        model.log_variance.copy_(self.variance.log())

    def to_model(self, **config: Any) -> SoftmaxGaussianMoEForRegression:
        """A model with these parameters.

        Args:
            **config: Fields of [`SoftmaxGaussianMoEConfig`] such as `gate`; sizes and temperature are filled in.

        Returns:
            [`SoftmaxGaussianMoEForRegression`]
        """
        sizes = {"num_components": self.num_components, "input_size": self.input_size, "temperature": self.temperature}
        model = SoftmaxGaussianMoEForRegression(SoftmaxGaussianMoEConfig(**{**sizes, **config}))
        self.write_to(model)
        return model

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers, for JSON."""
        return {**{name: getattr(self, name).tolist() for name in TENSORS}, "temperature": self.temperature}

    def __reduce__(self):
        # As numbers, not as tensors: those travel between processes by shared memory, which may be missing or full.
        return type(self).from_dict, (self.to_dict(),)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GaussianMoEParameters":
        """The inverse of [`~GaussianMoEParameters.to_dict`]."""
        return cls(**values)


TENSORS = tuple(field.name for field in fields(GaussianMoEParameters) if field.name != "temperature")
