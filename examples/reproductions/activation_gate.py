"""The activation gate: a tanh or sigmoid between the router's scores and a softmax whose temperature is learned.

All arms are models of equal size that send a token to two of eight experts at evaluation, trained for as many steps on
the same text; the dense-to-sparse arm spends more on a step, because its tokens get every expert at first. Each gate's
initial temperature is the better of two (with one seed): 1 and 0.1 for linear scores, 0.5 and 0.1 for the others.
"""

from functools import partial
from typing import Any

from harness import Bench, Reproduction


NUM_EXPERTS, TOP_K = 8, 2
# EvoMoE's gate: every expert first, the two best of a token from the middle of training on.
ANNEALED = {
    "temperature": {"type": "exponential", "start": 2.0, "end": 0.3, "num_steps": 0.5},
    "hard": {"type": "step", "at": 0.5},
}


def arm(bench: Bench, router_type: str, **options: Any) -> dict[str, float]:
    model = bench.language_model(
        num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, router_type=router_type, router_config=options
    )
    trainer = bench.train(model)
    return {
        "bits_per_byte": bench.evaluate(model),
        "experts_in_training": mean_logged(trainer, "active_experts", TOP_K),
        "temperature": final_temperature(model),
    }


def mean_logged(trainer: Any, key: str, otherwise: float) -> float:
    """Mean over the log lines that have it."""
    values = [line[key] for line in trainer.state.log_history if key in line]
    return sum(values) / len(values) if values else float(otherwise)


def final_temperature(model: Any) -> float:
    """Of the routers when training is over, what was learned included; a mean over layers."""
    from hf_moe.routing import find_routers

    values = []
    for router in find_routers(model).values():
        learned = getattr(router, "log_temperature", None)
        values.append(float(router.temperature) * (1.0 if learned is None else float(learned.detach().exp())))
    return sum(values) / len(values)


REPRODUCTION = Reproduction(
    name="activation_gate",
    papers=("2401.13875",),
    claim="Where a temperature is learned, an activation before the softmax makes routing easier to learn than linear "
    "scores do.",
    arms={
        "linear top-2": partial(arm, router_type="softmax_topk"),
        "linear, temperature 0.1": partial(arm, router_type="activation", activation="linear"),
        "tanh, learned from 0.5": partial(arm, router_type="activation", activation="tanh", temperature=0.5),
        "sigmoid, learned from 0.1": partial(arm, router_type="activation", activation="sigmoid"),
        "dense to sparse": partial(arm, router_type="dense_to_sparse", schedules=ANNEALED),
    },
    baseline="linear top-2",
)
