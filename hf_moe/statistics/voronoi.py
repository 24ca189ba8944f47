"""Voronoi losses: how far fitted parameters are from the true ones, when there may be more fitted experts than true.

Shapes: k fitted experts, m true experts, d inputs.
"""

import torch

from .parameters import GaussianMoEParameters


__all__ = ["align_gate", "match_components", "voronoi_cells", "voronoi_loss"]

#: r-bar of a cell by the number of fitted experts in it, where it is known (2305.03288).
ORDERS = {2: 4, 3: 6}


def voronoi_cells(fitted: GaussianMoEParameters, true: GaussianMoEParameters) -> torch.Tensor:
    """The true expert nearest to each fitted one, in |beta1| + |a| + |b| + |nu|.

    Args:
        fitted ([`GaussianMoEParameters`]): k experts.
        true ([`GaussianMoEParameters`]): m experts.

    Returns:
        `torch.Tensor` of shape `(k,)`: Indices from 0 to m - 1.

    Example:

    ```python
    >>> voronoi_cells(fitted, true)  # tensor([0, 1, 1]): the second true expert was fitted twice
    ```
    """
    return _total(_differences(fitted, true)).argmin(dim=-1)


def voronoi_loss(
    fitted: GaussianMoEParameters, true: GaussianMoEParameters, kind: str = "D1", top_k: int | None = None
) -> float:
    """The losses of [2309.13850](https://huggingface.co/papers/2309.13850), exactly.

    D1 = max over K of the true experts of sum_j [ sum_{i in A_j} exp(beta0_i) (|dbeta1_ij| + |da_ij| + |db_ij| +
    |dnu_ij|) + |sum_{i in A_j} exp(beta0_i) - exp(beta0*_j)| ], with A_j the Voronoi cells. In D2, a cell with more
    than one expert has |dbeta1|^r + |db|^r + |da|^(r/2) + |dnu|^(r/2) with r = 4 for two and 6 for three.

    Note: with a temperature (2401.13875) no loss is established; here beta0 becomes beta0 / temperature and the
    difference of the temperatures is added once. Without one that changes nothing.

    Args:
        fitted ([`GaussianMoEParameters`]): k experts; [`align_gate`] first where the gate's scores may be shifted.
        true ([`GaussianMoEParameters`]): m experts.
        kind (`str`, defaults to `"D1"`): `"D1"`, or `"D2"` for more fitted than true experts.
        top_k (`int`, *optional*): K of the true gate; m by default, the softmax gate.

    Returns:
        `float`: 0 only where the parameters are the same, in any order.

    Raises:
        ValueError: unknown kind, `top_k` out of range, sizes that differ, or a cell of four or more in D2, for which
            no r is known.

    Example:

    ```python
    >>> voronoi_loss(fitted, true, top_k=1)
    ```
    """
    if kind not in ("D1", "D2"):
        raise ValueError(f"`kind` must be 'D1' or 'D2', got {kind!r}.")
    top_k = true.num_components if top_k is None else top_k
    if not 1 <= top_k <= true.num_components:
        raise ValueError(f"`top_k` must be between 1 and the {true.num_components} true experts, got {top_k}.")
    differences = _differences(fitted, true)
    cells = _total(differences).argmin(dim=-1)
    mass, true_mass = ((p.gate_bias / p.temperature).exp() for p in (fitted, true))
    losses = []
    for j in range(true.num_components):
        members = cells == j
        powers = _powers(int(members.sum()), kind)
        distance = sum(differences[name][members, j] ** power for name, power in powers.items())
        losses.append((mass[members] * distance).sum() + (mass[members].sum() - true_mass[j]).abs())
    # No term depends on the others, so the best subset holds the K largest.
    largest = torch.stack(losses).topk(top_k).values.sum()
    return float(largest) + abs(fitted.temperature - true.temperature)


def align_gate(
    fitted: GaussianMoEParameters, true: GaussianMoEParameters, linear_scores: bool = True
) -> GaussianMoEParameters:
    """Undoes the shift that a softmax does not see: the fitted experts of the last true expert get its total mass
    exp(beta0) and, with linear scores, its beta1 as their weighted mean.

    The parameters of the papers are fixed by beta = 0 for the last expert. Which fitted expert that is, is not known,
    and there may be several, so this takes all of its Voronoi cell, found without the gate.

    Args:
        fitted ([`GaussianMoEParameters`]): k experts.
        true ([`GaussianMoEParameters`]): m experts.
        linear_scores (`bool`, defaults to `True`): `False` for the activation gate, whose beta1 has no such freedom.

    Returns:
        [`GaussianMoEParameters`]: The same density. Unchanged if no fitted expert is nearest to the last true one.

    Example:

    ```python
    >>> voronoi_loss(align_gate(fitted, true), true)
    ```
    """
    differences = _differences(fitted, true)
    del differences["gate_weight"]
    members = _total(differences).argmin(dim=-1) == true.num_components - 1
    if not members.any():
        return fitted
    scores = fitted.gate_bias[members] / fitted.temperature
    shift = true.gate_bias[-1] / true.temperature - scores.logsumexp(0)
    mean = scores.softmax(0) @ fitted.gate_weight[members]
    weight_shift = true.gate_weight[-1] - mean if linear_scores else torch.zeros_like(mean)
    return fitted.shifted(weight_shift, shift * fitted.temperature)


def match_components(fitted: GaussianMoEParameters, true: GaussianMoEParameters) -> GaussianMoEParameters:
    """The fitted experts in the order of the true ones: the pairing with the least total distance.

    Args:
        fitted ([`GaussianMoEParameters`]): k experts, in any order.
        true ([`GaussianMoEParameters`]): m <= k experts.

    Returns:
        [`GaussianMoEParameters`]: m of the fitted experts.

    Raises:
        ValueError: fewer fitted than true experts.
        ImportError: scipy is missing.

    Example:

    ```python
    >>> match_components(fitted, true).weight - true.weight
    ```
    """
    if fitted.num_components < true.num_components:
        raise ValueError(
            f"`fitted` has {fitted.num_components} components, fewer than the {true.num_components} of `true`: there "
            "is no pairing."
        )
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("`match_components` needs scipy. Run `pip install scipy`.") from error
    _, order = linear_sum_assignment(_total(_differences(fitted, true)).T.numpy())
    return fitted.permuted(order)


def _differences(fitted: GaussianMoEParameters, true: GaussianMoEParameters) -> dict[str, torch.Tensor]:
    """Parameter name to Euclidean distances `(k, m)`."""
    if fitted.input_size != true.input_size:
        raise ValueError(f"`fitted` has {fitted.input_size} inputs and `true` {true.input_size}: they must agree.")
    distances = {}
    for name in ("gate_weight", "weight", "bias", "variance"):
        a, b = (getattr(p, name).reshape(p.num_components, -1) for p in (fitted, true))
        distances[name] = (a.unsqueeze(1) - b.unsqueeze(0)).norm(dim=-1)
    return distances


def _total(differences: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(differences.values())).sum(0)


def _powers(size: int, kind: str) -> dict[str, float]:
    """Parameter name to the power of its distance in a cell of `size` fitted experts."""
    r, half = 1.0, 1.0
    if kind == "D2" and size > 1:
        if size not in ORDERS:
            raise ValueError(
                f"`kind='D2'` knows the order of cells of two and three fitted experts, but one has {size}. Fit fewer "
                "components, or use 'D1'."
            )
        r, half = float(ORDERS[size]), ORDERS[size] / 2
    powers = {"gate_weight": r, "weight": half, "bias": r, "variance": half}
    return powers
