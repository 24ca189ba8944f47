"""`softmax_gaussian_moe`: a regression whose conditional density is a gated mixture of Gaussians.

    p(y | x) = sum_i pi_i(x) N(y | a_i^T x + b_i, nu_i)

The model of [2401.13875](https://huggingface.co/papers/2401.13875),
[2309.13850](https://huggingface.co/papers/2309.13850) and [2305.03288](https://huggingface.co/papers/2305.03288).
"""

import math
from importlib import import_module

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from hf_moe.registration import load_modeling, register_config


__all__ = ["ACTIVATIONS", "GATES", "SoftmaxGaussianMoEConfig"]

GATES = ("softmax", "top_k", "dense_to_sparse", "activation")
#: Activation -> degree p where f(c t) = c^p f(t), `None` where there is no such p.
ACTIVATIONS: dict[str, int | None] = {
    "sigmoid": None,
    "tanh": None,
    "gelu": None,
    "silu": None,
    "linear": 1,
    "relu": 1,
    "square": 2,
}


@strict
class SoftmaxGaussianMoEConfig(PreTrainedConfig):
    r"""Configuration of [`SoftmaxGaussianMoEForRegression`].

    The gates, with scores s_i = beta1_i^T x + beta0_i: `"softmax"` is softmax(s); `"top_k"` keeps the K largest scores
    (2309.13850); `"dense_to_sparse"` is softmax(s / temperature); `"activation"` is
    softmax((f(beta1_i^T x) + beta0_i) / temperature) (2401.13875).

    Note: 2401.13875 does not say in its abstract where beta0 stands; here it is outside of f and divided too.

    Args:
        num_components (`int`, *optional*, defaults to 2): Experts of the mixture, k.
        input_size (`int`, *optional*, defaults to 1): Width d of x.
        gate (`str`, *optional*, defaults to `"softmax"`): One of the four above.
        top_k (`int`, *optional*): Scores that `gate="top_k"` keeps, 1 to k.
        activation (`str`, *optional*, defaults to `"tanh"`): f of `gate="activation"`: `"sigmoid"`, `"tanh"`,
            `"gelu"`, `"silu"`, and for comparison `"linear"`, `"relu"`, `"square"`.
        temperature (`float`, *optional*, defaults to 1.0): Divides the scores of the last two gates.
        learn_temperature (`bool`, *optional*, defaults to `False`): Make its logarithm a parameter.
        allow_unidentifiable (`bool`, *optional*, defaults to `False`): Let `learn_temperature` be used with scores
            that cannot identify it; for studies of exactly that.
        min_variance (`float`, *optional*, defaults to 1e-6): Floor of the variances: without one the likelihood is
            unbounded.
        dtype (`str`, *optional*, defaults to `"float64"`): Of the parameters.
        initializer_range (`float`, *optional*, defaults to 0.5): Standard deviation of random weights.

    Example:

    ```python
    >>> from hf_moe import SoftmaxGaussianMoEConfig, SoftmaxGaussianMoEForRegression
    >>> config = SoftmaxGaussianMoEConfig(num_components=3, input_size=2, gate="activation", learn_temperature=True)
    >>> model = SoftmaxGaussianMoEForRegression(config)
    ```
    """

    model_type = "softmax_gaussian_moe"

    num_components: int = 2
    input_size: int = 1
    gate: str = "softmax"
    top_k: int | None = None
    activation: str = "tanh"
    temperature: float | int = 1.0
    learn_temperature: bool = False
    allow_unidentifiable: bool = False
    min_variance: float | int = 1e-6
    initializer_range: float | int = 0.5

    def __post_init__(self, **kwargs):
        load_modeling(type(self))
        if self.dtype is None:
            self.dtype = "float64"
        super().__post_init__(**kwargs)
        # `@strict` checks again, but wraps what it catches in an error that is no ValueError.
        self.validate_architecture()

    def __setstate__(self, state: dict) -> None:
        # A config unpickled in a fresh process never runs `__post_init__`.
        self.__dict__.update(state)
        load_modeling(type(self))

    @property
    def score_degree(self) -> int | None:
        """p where f(c t) = c^p f(t): a factor of the temperature is then undone by one of the gate's parameters."""
        return ACTIVATIONS[self.activation] if self.gate == "activation" else 1

    @property
    def has_linear_scores(self) -> bool:
        """Whether the same vector added to every beta1_i changes nothing."""
        return self.gate != "activation" or self.activation == "linear"

    def validate_architecture(self):
        """Checks every field and their combination.

        Raises:
            ValueError: a field out of range, or a temperature that is learned where the density cannot tell it.
        """
        super().validate_architecture()
        for name in ("num_components", "input_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.gate not in GATES:
            raise ValueError(f"`gate` must be one of {list(GATES)}, got {self.gate!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {list(ACTIVATIONS)}, got {self.activation!r}.")
        if self.gate == "top_k":
            if self.top_k is None or not 1 <= self.top_k <= self.num_components:
                raise ValueError(
                    f"`top_k` must be between 1 and `num_components` ({self.num_components}) with `gate='top_k'`, "
                    f"got {self.top_k}."
                )
        elif self.top_k is not None:
            raise ValueError(f"`top_k={self.top_k}` needs `gate='top_k'`, got {self.gate!r}. Leave it out.")
        for name in ("temperature", "min_variance"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a positive number, got {value}.")
        self._validate_temperature()

    def _validate_temperature(self) -> None:
        if self.gate in ("softmax", "top_k") and (self.temperature != 1 or self.learn_temperature):
            raise ValueError(
                f"`gate={self.gate!r}` has no temperature: got `temperature={self.temperature}`, "
                f"`learn_temperature={self.learn_temperature}`. Use 'dense_to_sparse' or 'activation'."
            )
        if self.learn_temperature and self.score_degree is not None and not self.allow_unidentifiable:
            scores = f"`activation={self.activation!r}`" if self.gate == "activation" else "linear scores"
            power = "" if self.score_degree == 1 else f"^(1/{self.score_degree})"
            raise ValueError(
                f"`learn_temperature=True` cannot work with {scores}: (c{power} beta1, c beta0, c temperature) is the "
                "same density for every c, so that no amount of data tells them apart. Use `gate='activation'` with "
                "'tanh', 'sigmoid', 'gelu' or 'silu', or `allow_unidentifiable=True` to study that."
            )


def _modeling():
    return import_module(f"{__name__}.modeling_softmax_gaussian_moe")


def _model_classes() -> dict[str, type]:
    return {"AutoModel": _modeling().SoftmaxGaussianMoEForRegression}


def __getattr__(name: str):
    if name not in ("SoftmaxGaussianMoEForRegression", "SoftmaxGaussianMoEOutput"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_modeling(), name)


register_config(SoftmaxGaussianMoEConfig, _model_classes)
