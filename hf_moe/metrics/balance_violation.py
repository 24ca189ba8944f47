"""How far the busiest expert is above its fair share.

Loads by path too: `evaluate.load("<folder>/balance_violation.py", num_experts=8)`.
"""

import datasets
import evaluate

from hf_moe.metrics.summary import summarize_assignments


__all__ = ["BalanceViolation"]

DESCRIPTION = """
Maximal violation of balance, max_i c_i / mean(c) - 1 with c_i the assignments of expert i (2408.15664, Eq. 4): 0 is
perfectly even, N/K - 1 is as uneven as it can be. Per MoE layer, then the mean over layers: pooling layers first
would hide two that collapsed onto different experts.
"""
CITATION = """
@article{wang2024auxiliary,
  title={Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts},
  author={Wang, Lean and Gao, Huazuo and Zhao, Chenggang and Sun, Xu and Dai, Damai},
  journal={arXiv preprint arXiv:2408.15664},
  year={2024}
}
"""
INPUTS = """
Args:
    top_k_index (list of list of int): the K experts of each token; with several MoE layers, one such list per layer.
    num_experts (int): N; an index of N marks an empty slot.
Returns:
    max_violation (float, mean over layers), max_violation_worst_layer (float).
Example:
    >>> BalanceViolation(num_experts=4).compute(top_k_index=[[0, 1], [0, 2]])["max_violation"]
    1.0
"""


class BalanceViolation(evaluate.Metric):
    """max_i c_i / mean(c) - 1 of the expert counts, [2408.15664](https://huggingface.co/papers/2408.15664), Eq. 4.

    Input of `add_batch` and `compute`: `top_k_index` as in [`~hf_moe.metrics.ExpertLoad`].

    Args:
        num_experts (`int`, *optional*): N; may be given to `compute` instead.

    Example:
        ```python
        BalanceViolation(num_experts=4).compute(top_k_index=[[0, 1], [2, 3]])  # 0.0: every expert has one token
        ```
    """

    def __init__(self, *args, num_experts: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_experts = num_experts

    def _info(self) -> evaluate.MetricInfo:
        one_layer = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"top_k_index": datasets.Sequence(one_layer)}),
                datasets.Features({"top_k_index": one_layer}),
            ],
        )

    # A combined evaluation hands every metric the inputs of all of them.
    def _compute(self, top_k_index, num_experts: int | None = None, **_inputs_of_others) -> dict[str, float]:
        violation = summarize_assignments(top_k_index, num_experts or self.num_experts).max_violation
        return {"max_violation": violation.mean().item(), "max_violation_worst_layer": violation.max().item()}
