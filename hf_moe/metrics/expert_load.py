"""Share of assignments each expert received.

Loads by path too: `evaluate.load("<folder>/expert_load.py", num_experts=8)`.
"""

import datasets
import evaluate

from hf_moe.metrics.summary import summarize_assignments


__all__ = ["ExpertLoad"]

DESCRIPTION = """
Expert load f_i = assignments of expert i / all assignments. It sums to 1; 1/N is balanced. Empty slots do not count.
"""
INPUTS = """
Args:
    top_k_index (list of list of int): the K experts of each token; with several MoE layers, one such list per layer.
    num_experts (int): N; an index of N marks an empty slot.
Returns:
    expert_load (list of N floats, or one such list per layer), dead_share (float: experts without any token).
Example:
    >>> ExpertLoad(num_experts=4).compute(top_k_index=[[0, 1], [0, 2]])
    {'expert_load': [0.5, 0.25, 0.25, 0.0], 'dead_share': 0.25}
"""


class ExpertLoad(evaluate.Metric):
    """Share of assignments per expert, and the share of experts that received none.

    Input of `add_batch` and `compute`: `top_k_index`, one row per token: `(K,)`, or `(L, K)` for all layers at once.
    Leave padding tokens out.

    Args:
        num_experts (`int`, *optional*): N; may be given to `compute` instead.

    Example:
        ```python
        with record_routing(model) as recorder:
            model(**batch)
        index = torch.stack([layer.top_k_index[0] for layer in recorder.layers], dim=1)  # (T, L, K)
        ExpertLoad(num_experts=8).compute(top_k_index=index[batch["attention_mask"].flatten().bool()])
        ```
    """

    def __init__(self, *args, num_experts: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_experts = num_experts

    def _info(self) -> evaluate.MetricInfo:
        one_layer = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"top_k_index": datasets.Sequence(one_layer)}),
                datasets.Features({"top_k_index": one_layer}),
            ],
        )

    # A combined evaluation hands every metric the inputs of all of them.
    def _compute(self, top_k_index, num_experts: int | None = None, **_inputs_of_others) -> dict:
        summary = summarize_assignments(top_k_index, num_experts or self.num_experts)
        load = summary.load.tolist()
        return {
            "expert_load": load if len(load) > 1 else load[0],
            "dead_share": summary.dead_share.mean().item(),
        }
