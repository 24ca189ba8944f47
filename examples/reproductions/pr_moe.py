"""PR-MoE: more experts in the last layers and a dense feed-forward beside them, against the same number everywhere.

Sizes are in the paper's proportion: the plain model has four times the experts of the pyramid's lower layers.
"""

from functools import partial

from harness import Bench, Reproduction


__all__ = ["REPRODUCTION"]

#: The gate of the released code: the probability itself as weight, random choice of who stays, nobody below four.
GATE = {"norm_topk_prob": False, "capacity_policy": "random", "min_capacity": 4}


def run(bench: Bench, pyramid: bool, residual: bool, top_k: int = 1) -> dict[str, float]:
    """Held-out bits per byte, and the parameters it took.

    Args:
        bench ([`Bench`]): Preset and seed.
        pyramid (`bool`): A quarter of the experts in all layers but the last, which has half of them.
        residual (`bool`): A dense feed-forward beside the experts.
        top_k (`int`, defaults to 1): Experts per token.
    """
    most = bench.preset.scale(16, 64, tiny=8)
    counts = [most] * bench.preset.layers
    if pyramid:
        counts = [most // 4] * (bench.preset.layers - 1) + [most // 2]
    model = bench.language_model(
        num_experts=counts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=bench.preset.intermediate_size,  # experts and dense branch are of one size
        residual_expert=residual,
        expert_capacity_factor=1.0,
        router_config=GATE if top_k == 1 else {**GATE, "norm_topk_prob": True},
    )
    bench.train(model)
    return {
        "bits_per_byte": bench.evaluate(model),
        "million_parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
    }


REPRODUCTION = Reproduction(
    name="pr_moe",
    papers=("2201.05596",),
    claim="Pyramid and residual together reach the quality of a plain MoE with about a third of its parameters; the "
    "residual with one expert does what two experts do.",
    arms={
        "plain, top-1": partial(run, pyramid=False, residual=False),
        "plain, top-2": partial(run, pyramid=False, residual=False, top_k=2),
        "pyramid": partial(run, pyramid=True, residual=False),
        "residual": partial(run, pyramid=False, residual=True),
        "PR-MoE": partial(run, pyramid=True, residual=True),
    },
    baseline="plain, top-1",
)
