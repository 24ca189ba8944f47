"""COMET (2306.02824): a gate of trees that becomes sparse by itself, and a local search over the order of experts.

Arms: top-k, hash and DSelect-k as baselines, COMET, and COMET after a local search over the first fifth of the run.
All have eight experts, of which a token gets two, or at most two. `active_experts` says how many it got on held-out
text: COMET and DSelect-k get there by their entropy, and training costs more as long as they are not sparse.
"""

from harness import Bench, Reproduction

from hf_moe.metrics import active_flops


__all__ = ["REPRODUCTION"]

EXPERTS, K = 8, 2


def run(bench: Bench, router_type: str, **fields) -> dict[str, float]:
    """Trains a model with this router; quality, and experts per token, on held-out text."""
    model = bench.language_model(num_experts=EXPERTS, num_experts_per_tok=K, router_type=router_type, **fields)
    trainer = bench.train(model)
    blocks = next(iter(bench.held_out.values()))
    cost = active_flops(model, {"input_ids": blocks[:8]}, use_cache=False)
    return {
        "bits_per_byte": bench.evaluate(model),
        "active_experts": cost["active_experts"],
        "training_teraflops": trainer.state.total_flos / 1e12,
    }


def top_k(bench: Bench) -> dict[str, float]:
    return run(bench, "softmax_topk")


def hash_table(bench: Bench) -> dict[str, float]:
    return run(bench, "hash", router_aux_loss_coef=0.0)


def tree(bench: Bench, router_type: str, **options) -> dict[str, float]:
    """The paper searches gamma and the weight of the entropy on every data set. These are the best for both gates
    together of (0.1, 0.1), (1, 0.1), (1, 0.01) and (1, 0.001), by 100 steps with another seed."""
    options = {"gamma": 1.0, "entropy_coef": 0.01, **options}
    return run(bench, router_type, router_aux_loss_coef=0.0, router_config=options)


def dselect_k(bench: Bench) -> dict[str, float]:
    return tree(bench, "dselect_k")


def comet(bench: Bench) -> dict[str, float]:
    return tree(bench, "comet")


def comet_with_local_search(bench: Bench) -> dict[str, float]:
    # The paper's search takes 1 to 10 of at least 100 epochs, at rates of 5e-5 to 1e-3, as A's is here.
    search = {"num_steps": 0.2, "learning_rate_scale": min(1.0, 3e-4 / bench.preset.learning_rate)}
    return tree(bench, "comet", permutation_search=search)


REPRODUCTION = Reproduction(
    name="comet",
    papers=("2306.02824",),
    claim="COMET is better than top-k, hash and DSelect-k gates, and better still after a permutation local search.",
    arms={
        "top-k": top_k,
        "hash": hash_table,
        "DSelect-k": dselect_k,
        "COMET": comet,
        "COMET + local search": comet_with_local_search,
    },
    baseline="top-k",
)
