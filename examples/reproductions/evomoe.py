"""EvoMoE: one expert first, then many behind a gate that goes from dense to sparse, against routing from the start.

All arms end as models of equal size that send a token to one expert, after as many steps in all, on the same text with
one learning-rate schedule. In the two-phase arms the first part of the steps trains one expert per layer.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Bench, Reproduction
from transformers.trainer_callback import PrinterCallback

from hf_moe import record_routing
from hf_moe.trainers import EvoMoETrainingArguments, MoeTrainer, train_evomoe


NUM_EXPERTS = 4
SWITCH = {"num_experts_per_tok": 1, "router_type": "softmax_topk", "router_config": {"norm_topk_prob": False}}
# Switch's weights are probabilities, 1 / N on average at first: times N, an expert starts at full size.
SCALED = {**SWITCH, "router_config": {"norm_topk_prob": False, "routed_scaling_factor": float(NUM_EXPERTS)}}


class QuietTrainer(MoeTrainer):
    """Without the table of losses on the screen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)


class TwoPhases:
    """Both phases as `Bench.train` wants a trainer: made, then trained."""

    def __init__(self, model: Any, args: Any, **options: Any):
        self.parts = (model, args, options)

    def remove_callback(self, callback: Any) -> None:
        """Nothing to remove: the trainers are not made yet."""

    def train(self) -> None:
        model, args, options = self.parts
        trainer = train_evomoe(model, args, QuietTrainer, **options)
        self.model, self.state = trainer.model, trainer.state


@dataclass
class CopiesArguments(EvoMoETrainingArguments):
    """The second phase routes at once: equal experts, which start as the one there was, and Switch's router."""

    diversify: str = "copy"
    gate_start: str = "fresh"

    def router_fields(self) -> dict[str, Any]:
        return SCALED


def switch(bench: Bench, fields: dict[str, Any]) -> dict[str, float]:
    model = bench.language_model(num_experts=NUM_EXPERTS, **fields)
    return figures(bench, bench.train(model))


def two_phases(bench: Bench, arguments_class: type, **options: Any) -> dict[str, float]:
    model = bench.language_model(num_experts=1, num_experts_per_tok=1)
    done = bench.train(
        model,
        trainer_class=TwoPhases,
        arguments_class=arguments_class,
        num_experts=NUM_EXPERTS,
        expert_steps=0.3,
        **options,
    )
    return figures(bench, done)


def figures(bench: Bench, done: Any) -> dict[str, float]:
    """Held-out loss; experts per token in training, a mean over its steps, and the share of held-out tokens of the
    busiest expert, a mean over layers (0.25 is even)."""
    model = done.model
    score = bench.evaluate(model)
    active = [log["active_experts"] for log in done.state.log_history if "active_experts" in log and "loss" in log]
    with torch.no_grad(), record_routing(model.eval()) as recorder:
        for batch in torch.cat(list(bench.held_out.values())).split(16):
            model(input_ids=batch)
    loads = [
        torch.cat(layer.top_k_index).flatten().bincount(minlength=NUM_EXPERTS).float() for layer in recorder.layers
    ]
    busiest = sum(float(load.max() / load.sum()) for load in loads) / len(loads)
    return {"bits_per_byte": score, "experts_in_training": sum(active) / len(active), "busiest": busiest}


REPRODUCTION = Reproduction(
    name="evomoe",
    papers=("2112.14397",),
    claim="Training one expert before many, and annealing the gate from dense to sparse, beats Switch routing from "
    "the start and routing between copies.",
    arms={
        "Switch": partial(switch, fields=SWITCH),
        "Switch, times N": partial(switch, fields=SCALED),
        "copies, Switch times N": partial(two_phases, arguments_class=CopiesArguments),
        "EvoMoE": partial(two_phases, arguments_class=EvoMoETrainingArguments),
        "EvoMoE, equal copies": partial(two_phases, arguments_class=EvoMoETrainingArguments, diversify="copy"),
    },
    baseline="Switch, times N",
)
