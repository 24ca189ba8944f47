"""What scikit-learn asks of an estimator, without scikit-learn: parameters by name, tags, and checks of input."""

import inspect
from typing import Any

import numpy as np


__all__ = ["EstimatorProtocol", "check_inputs", "check_targets"]


class EstimatorProtocol:
    """Parameters are those of `__init__`, which only stores them; what `fit` finds ends in an underscore.

    Enough for `clone`, `Pipeline`, `GridSearchCV` and the checks of `sklearn.utils.estimator_checks`.
    """

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Name to value of every parameter.

        Args:
            deep (`bool`, defaults to `True`): For scikit-learn; there are no nested estimators here.

        Returns:
            `dict`
        """
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **parameters: Any) -> "EstimatorProtocol":
        """Sets parameters by name.

        Returns:
            The estimator.

        Raises:
            ValueError: there is no such parameter.
        """
        if unknown := sorted(set(parameters) - set(self._parameter_names())):
            raise ValueError(
                f"Invalid parameter {unknown[0]!r} for estimator {self}. Valid parameters are: "
                f"{self._parameter_names()}."
            )
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value is not defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self):
        # Only scikit-learn calls this, so it is there.
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True),
            transformer_tags=None,
            classifier_tags=None,
            regressor_tags=RegressorTags(poor_score=True),  # the score is a log-likelihood and no R^2
            input_tags=InputTags(),
            non_deterministic=False,
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")


def check_inputs(X: Any, estimator: Any, fitting: bool = False) -> np.ndarray:
    """X as a float64 array `(n, d)`; remembers number and names of columns when fitting and compares them afterwards.

    Args:
        X: Array, tensor, data frame or list of rows.
        estimator: Whose `n_features_in_` and `feature_names_in_` are written or read.
        fitting (`bool`, defaults to `False`): Write them.

    Returns:
        `np.ndarray`

    Raises:
        TypeError: sparse input.
        ValueError: another shape, no row or column, NaN or infinity, complex numbers, other columns than in fit.
    """
    names = _column_names(X)
    if hasattr(X, "toarray"):
        raise TypeError("Sparse data was passed, but dense data is required. Use `X.toarray()`.")
    array = _as_float(X, "X")
    if array.ndim != 2:
        raise ValueError(
            f"Expected 2D array, got {array.ndim}D array instead: `X` must have shape (n, d). Reshape your data with "
            "array.reshape(-1, 1) if it has a single feature or array.reshape(1, -1) if it contains a single sample."
        )
    for axis, what in enumerate(("sample", "feature")):
        if array.shape[axis] == 0:
            raise ValueError(f"Found array with 0 {what}(s) (shape={array.shape}) while a minimum of 1 is required.")
    name = type(estimator).__name__
    if fitting:
        estimator.n_features_in_ = array.shape[1]
        if names is not None:
            estimator.feature_names_in_ = names
        elif hasattr(estimator, "feature_names_in_"):
            del estimator.feature_names_in_
        return array
    _compare_names(names, getattr(estimator, "feature_names_in_", None), name)
    if array.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {array.shape[1]} features, but {name} is expecting {estimator.n_features_in_} features as input."
        )
    return array


def check_targets(y: Any, num_samples: int) -> np.ndarray:
    """y as a float64 array `(n,)`.

    Args:
        y: Array, tensor, series or list.
        num_samples (`int`): Rows of X.

    Returns:
        `np.ndarray`

    Raises:
        ValueError: missing, another shape or length, NaN or infinity.
    """
    if y is None:
        raise ValueError("This estimator requires y to be passed, but the target y is None.")
    array = _as_float(y, "y")
    if array.ndim == 2 and array.shape[1] == 1:
        _warn_column()
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"y should be a 1d array, got an array of shape {array.shape} instead.")
    if len(array) != num_samples:
        raise ValueError(f"Found input variables with inconsistent numbers of samples: {[num_samples, len(array)]}.")
    return array


def _as_float(values: Any, name: str) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    array = np.asarray(values)
    if np.iscomplexobj(array):
        raise ValueError(f"Complex data not supported, in `{name}`: {array.dtype}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"Input {name} contains NaN or infinity. Leave those rows out, or fill them in.")
    return array


def _column_names(X: Any) -> np.ndarray | None:
    columns = getattr(X, "columns", None)
    if columns is None or not len(columns) or not all(isinstance(column, str) for column in columns):
        return None
    return np.asarray(columns, dtype=object)


def _compare_names(names: np.ndarray | None, fitted: np.ndarray | None, name: str) -> None:
    import warnings

    if names is None:
        if fitted is not None:
            message = f"X does not have valid feature names, but {name} was fitted with feature names"
            warnings.warn(message, stacklevel=4)
    elif fitted is None:
        warnings.warn(f"X has feature names, but {name} was fitted without feature names", stacklevel=4)
    elif not np.array_equal(names, fitted):
        raise ValueError(
            "The feature names should match those that were passed during fit.\n" + _name_differences(names, fitted)
        )


def _name_differences(names: np.ndarray, fitted: np.ndarray) -> str:
    unseen, missing = sorted(set(names) - set(fitted)), sorted(set(fitted) - set(names))
    if not unseen and not missing:
        return "Feature names must be in the same order as they were in fit.\n"
    lines = ["Feature names unseen at fit time:", *(f"- {name}" for name in unseen)] if unseen else []
    lines += (
        ["Feature names seen at fit time, yet now missing:", *(f"- {name}" for name in missing)] if missing else []
    )
    return "\n".join(lines) + "\n"


def _warn_column() -> None:
    import sys
    import warnings

    # The category scikit-learn's users filter by, if they use it.
    exceptions = sys.modules.get("sklearn.exceptions")
    category = exceptions.DataConversionWarning if exceptions is not None else UserWarning
    warnings.warn(
        "A column-vector y was passed when a 1d array was expected. Please change the shape of y to (n_samples,), for "
        "example using ravel().",
        category,
        stacklevel=4,
    )
