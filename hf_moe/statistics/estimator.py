"""A scikit-learn style estimator of the softmax-gated Gaussian mixture of experts.

Shapes: n observations, d inputs, k experts of the mixture.
"""

from typing import Any

import numpy as np
import torch

from hf_moe.models.softmax_gaussian_moe import SoftmaxGaussianMoEConfig
from hf_moe.models.softmax_gaussian_moe.modeling_softmax_gaussian_moe import SoftmaxGaussianMoEForRegression

from .estimator_protocol import EstimatorProtocol, check_inputs, check_targets
from .expectation_maximization import fit_em
from .initialization import move_to, search_start
from .lbfgs import fit_lbfgs
from .parameters import GaussianMoEParameters


__all__ = ["SoftmaxGaussianMoE"]

METHODS = ("lbfgs", "em")


class SoftmaxGaussianMoE(EstimatorProtocol):
    """Mixture of linear regressions whose weights depend on x, fitted by maximum likelihood.

    p(y | x) = sum_i pi_i(x) N(y | a_i^T x + b_i, nu_i), with the gates of
    [2305.03288](https://huggingface.co/papers/2305.03288) (softmax),
    [2309.13850](https://huggingface.co/papers/2309.13850) (top-K) and
    [2401.13875](https://huggingface.co/papers/2401.13875) (temperature, activation), in float64. Works in pipelines
    and searches of scikit-learn, and does not need it.

    Note: `score` is a log-likelihood, as of scikit-learn's mixtures, and no R^2.

    Args:
        num_components (`int`, defaults to 2): Experts, k.
        gate (`str`, defaults to `"softmax"`): `"softmax"`, `"top_k"`, `"dense_to_sparse"` or `"activation"`; see
            [`SoftmaxGaussianMoEConfig`].
        top_k (`int`, *optional*): Experts that `gate="top_k"` keeps.
        activation (`str`, defaults to `"tanh"`): Of `gate="activation"`.
        temperature (`float`, defaults to 1.0): Divides the gate's scores.
        learn_temperature (`bool`, defaults to `False`): Estimate it; refused where the density does not determine it.
        method (`str`, defaults to `"lbfgs"`): `"lbfgs"` on the exact log-likelihood, after a short EM, or `"em"`.
        init (`str` or [`GaussianMoEParameters`], defaults to `"kmeans"`): Where the search begins.
        n_init (`int`, defaults to 5): Random starts, of which the best is pursued.
        max_iter (`int`, defaults to 500): Iterations at most.
        tol (`float`, *optional*): 1e-6: the change of the mean log-likelihood in EM, the gradient in L-BFGS.
        min_variance (`float`, defaults to 1e-6): Floor of the variances, in units of y squared.
        random_state (`int` or `np.random.RandomState`, *optional*): Seed of the starts.
        device (`str`, defaults to `"cpu"`): Where torch computes.

    Attributes:
        model_ ([`SoftmaxGaussianMoEForRegression`]): The density; `model_.save_pretrained(folder)` keeps it.
        parameters_ ([`GaussianMoEParameters`]): Its parameters; the last expert's gate bias is 0.
        log_likelihood_ (`float`): Mean log p(y | x) of the data.
        n_iter_ (`int`), converged_ (`bool`): How the fit ended.

    Example:

    ```python
    >>> moe = SoftmaxGaussianMoE(num_components=2, gate="activation", learn_temperature=True, random_state=0)
    >>> moe.fit(X, y).predict(X)
    ```
    """

    def __init__(
        self,
        num_components: int = 2,
        *,
        gate: str = "softmax",
        top_k: int | None = None,
        activation: str = "tanh",
        temperature: float = 1.0,
        learn_temperature: bool = False,
        method: str = "lbfgs",
        init: str | GaussianMoEParameters = "kmeans",
        n_init: int = 5,
        max_iter: int = 500,
        tol: float | None = None,
        min_variance: float = 1e-6,
        random_state: Any = None,
        device: str = "cpu",
    ):
        self.num_components = num_components
        self.gate = gate
        self.top_k = top_k
        self.activation = activation
        self.temperature = temperature
        self.learn_temperature = learn_temperature
        self.method = method
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.min_variance = min_variance
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> "SoftmaxGaussianMoE":
        """Maximises the log-likelihood.

        Args:
            X (array of shape `(n, d)`): Inputs.
            y (array of shape `(n,)`): Targets.

        Returns:
            The estimator.

        Raises:
            ValueError: parameters or data that make no sense; fewer observations than components.
        """
        inputs = check_inputs(X, self, fitting=True)
        targets = check_targets(y, len(inputs))
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {self.method!r}.")
        if self.n_init < 1 or self.max_iter < 1:
            raise ValueError(f"`n_init` and `max_iter` must be positive, got {self.n_init} and {self.max_iter}.")
        if len(inputs) < self.num_components:
            raise ValueError(
                f"`num_components={self.num_components}` needs as many observations; got n_samples = {len(inputs)}."
            )
        x, y = (torch.from_numpy(array).to(self.device) for array in (inputs, targets))
        model = self._start(x, y)
        options: dict[str, Any] = {"max_iter": self.max_iter} | ({} if self.tol is None else {"tol": self.tol})
        if self.method == "em":
            result = fit_em(model, x, y, search_selection=True, **options)
        else:
            if model.config.gate == "top_k":
                # The selection jumps, which a line search does not expect: EM settles it first.
                fit_em(model, x, y, max_iter=self.max_iter, search_selection=True)
            result = fit_lbfgs(model, x, y, **options)
        self.model_ = model.eval()
        self.parameters_ = GaussianMoEParameters.of(model)
        self.log_likelihood_, self.n_iter_ = result.log_likelihood, max(result.iterations, 1)
        self.converged_ = result.converged
        return self

    def _start(self, x: torch.Tensor, y: torch.Tensor) -> SoftmaxGaussianMoEForRegression:
        names = ("num_components", "gate", "top_k", "activation", "temperature", "learn_temperature", "min_variance")
        config = SoftmaxGaussianMoEConfig(input_size=x.shape[1], **{name: getattr(self, name) for name in names})
        with torch.random.fork_rng(devices=[]):  # the model's own random weights are replaced
            model = SoftmaxGaussianMoEForRegression(config)
        move_to(model, self.device)
        if isinstance(self.init, GaussianMoEParameters):
            self.init.write_to(model)
        elif self.init == "kmeans":
            search_start(model, x, y, self.n_init, _generator(self.random_state))
        else:
            raise ValueError(f"`init` must be 'kmeans' or GaussianMoEParameters, got {self.init!r}.")
        return model

    def predict(self, X: Any) -> np.ndarray:
        """E[y | x], `(n,)`.

        Args:
            X (array of shape `(n, d)`): Inputs.
        """
        return self._evaluate(X).mean.numpy(force=True)

    def predict_gates(self, X: Any) -> np.ndarray:
        """pi(x), `(n, k)`: the weight of each expert before y is seen.

        Args:
            X (array of shape `(n, d)`): Inputs.
        """
        return self._evaluate(X).gates.numpy(force=True)

    def predict_variance(self, X: Any) -> np.ndarray:
        """Var[y | x], `(n,)`.

        Args:
            X (array of shape `(n, d)`): Inputs.
        """
        outputs = self._evaluate(X)
        second = (outputs.gates * (outputs.expert_variances + outputs.expert_means.square())).sum(-1)
        return (second - outputs.mean.square()).numpy(force=True)

    def responsibilities(self, X: Any, y: Any) -> np.ndarray:
        """Probability of each expert when both x and y are known, `(n, k)`; rows sum to 1.

        Args:
            X (array of shape `(n, d)`): Inputs.
            y (array of shape `(n,)`): Targets.
        """
        return self._joint(X, y).softmax(-1).numpy(force=True)

    def log_density(self, X: Any, y: Any) -> np.ndarray:
        """log p(y | x), `(n,)`.

        Args:
            X (array of shape `(n, d)`): Inputs.
            y (array of shape `(n,)`): Targets.
        """
        return self._joint(X, y).logsumexp(-1).numpy(force=True)

    def score(self, X: Any, y: Any) -> float:
        """Mean log p(y | x); higher is better.

        Args:
            X (array of shape `(n, d)`): Inputs.
            y (array of shape `(n,)`): Targets.
        """
        return float(self.log_density(X, y).mean())

    def sample(self, X: Any, random_state: Any = None) -> np.ndarray:
        """One y for each row of X, drawn from the fitted density, `(n,)`.

        Args:
            X (array of shape `(n, d)`): Inputs.
            random_state (`int` or `np.random.RandomState`, *optional*): Seed.
        """
        model = self._fitted()
        x = torch.from_numpy(check_inputs(X, self)).to(self.device)
        seed = _generator(random_state).initial_seed()
        return model.sample(x, torch.Generator(self.device).manual_seed(seed)).numpy(force=True)

    def _fitted(self) -> SoftmaxGaussianMoEForRegression:
        if not hasattr(self, "model_"):
            raise _not_fitted(f"This {type(self).__name__} instance is not fitted yet. Call 'fit' first.")
        return self.model_

    @torch.no_grad()
    def _evaluate(self, X: Any):
        model = self._fitted()
        return model(torch.from_numpy(check_inputs(X, self)).to(self.device))

    @torch.no_grad()
    def _joint(self, X: Any, y: Any) -> torch.Tensor:
        model = self._fitted()
        inputs = check_inputs(X, self)
        targets = check_targets(y, len(inputs))
        return model.log_joint(*(torch.from_numpy(array).to(self.device) for array in (inputs, targets)))


def _generator(random_state: Any) -> torch.Generator:
    """A CPU generator from what scikit-learn calls a random state."""
    if hasattr(random_state, "randint"):  # np.random.RandomState
        seed = int(random_state.randint(2**31 - 1))
    else:
        seed = int(np.random.SeedSequence(random_state).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def _not_fitted(message: str) -> Exception:
    import sys

    # What scikit-learn raises, for those who catch it; it is both of the standard errors.
    exceptions = sys.modules.get("sklearn.exceptions")
    return exceptions.NotFittedError(message) if exceptions is not None else ValueError(message)
