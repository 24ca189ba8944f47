"""Whether an upcycled layer computes what the dense one did, decided before anything is computed."""

from typing import NamedTuple


__all__ = ["Exactness"]


class Exactness(NamedTuple):
    """Prediction for one combination of experts, router and weight rule.

    Args:
        exact (`bool`): The MoE layer equals the dense feed-forward, up to rounding, for every input.
        reason (`str`): Why, or why not: half a sentence.
        scale (`float`): Factor folded into the experts: makes an exact start exact, and keeps the mean size of the
            output for the others.
    """

    exact: bool
    reason: str
    scale: float
