"""How undecided a router is, token by token and on average.

Loads by path too: `evaluate.load("<folder>/routing_entropy.py")`.
"""

import math

import datasets
import evaluate

from hf_moe.metrics.summary import marginal_entropy, summarize_probabilities


__all__ = ["RoutingEntropy"]

DESCRIPTION = """
Entropy of the router's distribution over experts, in nats. `routing_entropy` is the mean over tokens of H(p_t): 0 is
certain, ln N undecided. `marginal_entropy` is H(mean of p_t): ln N where the text as a whole uses all experts alike.
The gap between the two is the mutual information of token and expert: 0 where all tokens are routed the same way.
Per MoE layer, then the mean over layers.
"""
INPUTS = """
Args:
    probabilities (list of list of float): the distribution of each token, rows summing to 1; with several MoE layers,
        one such list per layer.
Returns:
    routing_entropy, marginal_entropy, routing_entropy_normalized (divided by ln N: 1 is undecided); all floats.
Example:
    >>> RoutingEntropy().compute(probabilities=[[0.5, 0.5], [1.0, 0.0]])["routing_entropy"]  # half of ln 2
    0.34657
"""


class RoutingEntropy(evaluate.Metric):
    """Mean entropy per token and entropy of the mean distribution, in nats.

    Input of `add_batch` and `compute`: `probabilities`, one row per token: `(N,)`, or `(L, N)` for all layers at
    once; [`MoeLayerView.probabilities`] makes them from logits. Leave padding tokens out.

    Example:
        ```python
        layer = recorder.layers[0]  # of `record_routing`
        RoutingEntropy().compute(probabilities=layer.view.probabilities(layer.router_logits[0]))
        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        one_layer = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"probabilities": datasets.Sequence(one_layer)}),
                datasets.Features({"probabilities": one_layer}),
            ],
        )

    # A combined evaluation hands every metric the inputs of all of them.
    def _compute(self, probabilities, **_inputs_of_others) -> dict[str, float]:
        summary = summarize_probabilities(probabilities)
        entropy = summary.entropy.mean().item()
        return {
            "routing_entropy": entropy,
            "marginal_entropy": marginal_entropy(summary).mean().item(),
            "routing_entropy_normalized": entropy / max(math.log(summary.mean_probability.shape[-1]), 1e-12),
        }
