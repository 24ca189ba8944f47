"""SMoE-Dropout (2303.01610): a frozen random router and a growing number of experts, for a model that runs with any.

Arms: one model trained with k growing linearly from 1 to all 16 experts behind a frozen random router; fixed top-k
models (learned router and balance loss) trained with 2 and with 8 experts; and a model trained with all 16. Each is
evaluated with 1, 2, 4, 8 and 16 experts (`k_1` ... `k_16`, in bits per byte): the self-slimming curve. Its mean is
compared.
"""

from harness import Bench, Reproduction

from hf_moe.trainers import evaluate_at_k


__all__ = ["REPRODUCTION"]

EXPERTS = 16
CURVE = (1, 2, 4, 8, 16)


def run(bench: Bench, k: int, **fields) -> dict[str, float]:
    """Trains a model and evaluates it with every number of experts."""
    width = max(bench.preset.intermediate_size // 8, 8)  # all experts together: twice the dense feed-forward
    model = bench.language_model(num_experts=EXPERTS, num_experts_per_tok=k, moe_intermediate_size=width, **fields)
    trainer = bench.train(model)
    curve = evaluate_at_k(trainer, CURVE, bench.evaluate)
    figures = {f"k_{number}": value for number, value in curve.items()}
    return {
        "mean_bits_per_byte": sum(curve.values()) / len(curve),
        **figures,
        "training_teraflops": trainer.state.total_flos / 1e12,
    }


def smoe_dropout(bench: Bench) -> dict[str, float]:
    growing = {"k": {"type": "linear", "start": 1, "end": EXPERTS, "num_steps": 1.0}}
    return run(bench, 1, router_type="fixed_random", router_aux_loss_coef=0.0, router_config={"schedules": growing})


def fixed(k: int):
    """An arm with a learned router and always `k` experts."""

    def arm(bench: Bench) -> dict[str, float]:
        return run(bench, k)

    return arm


REPRODUCTION = Reproduction(
    name="smoe_dropout",
    papers=("2303.01610",),
    claim="Quality rises smoothly with the number of experts at inference; fixed top-k saturates or gets worse.",
    metric="mean_bits_per_byte",
    arms={"top-2": fixed(2), "top-8": fixed(8), "all 16": fixed(EXPERTS), "SMoE-Dropout": smoe_dropout},
    baseline="top-2",
)
