"""Dynamic routing (2403.07652): experts until their probabilities add up to p, against top-2 at as many experts.

Arms: top-2 of 16, with and without renormalised weights (top-p has none); top-p at the paper's p = 0.4; and top-p
whose p is steered during training until tokens get two experts on average, so that both activate as many parameters. A
model that gives hard tokens more and easy ones less should do better. `active_experts` is counted on held-out text.
"""

import torch
from harness import Bench, Reproduction
from transformers import TrainerCallback

from hf_moe.metrics import active_flops


__all__ = ["REPRODUCTION"]

EXPERTS, K = 16, 2


class SteerP(TrainerCallback):
    """Moves p of all routers towards `target` experts per token, every few steps.

    Args:
        blocks (`torch.Tensor` of shape `(M, S)`): Training text to count on.
        target (`float`): Experts per token, a mean over layers.
    """

    def __init__(self, blocks: torch.Tensor, target: float):
        self.blocks = blocks
        self.target = target
        self.p = 0.4

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % 5 == 0:
            block = self.blocks[state.global_step % len(self.blocks)].unsqueeze(0)
            active = active_flops(model, {"input_ids": block}, use_cache=False)["active_experts"]
            self.p = min(self.p * (self.target / active) ** 0.3, 1.0)
        for _, block in model.moe_blocks():
            block.gate.p.fill_(self.p)


def run(bench: Bench, callbacks=(), **fields) -> dict[str, float]:
    """Trains a model; quality, experts per token and cost on held-out text."""
    width = max(bench.preset.intermediate_size // 4, 8)
    model = bench.language_model(num_experts=EXPERTS, num_experts_per_tok=K, moe_intermediate_size=width, **fields)
    trainer = bench.train(model, callbacks=callbacks)
    blocks = torch.cat([blocks[:4] for blocks in bench.held_out.values()])
    cost = active_flops(model, {"input_ids": blocks}, use_cache=False)
    return {
        "bits_per_byte": bench.evaluate(model),
        "active_experts": cost["active_experts"],
        "megaflops_per_token": cost["flops_per_token"] / 1e6,
        "training_teraflops": trainer.state.total_flos / 1e12,
    }


def top_2(bench: Bench) -> dict[str, float]:
    return run(bench)


def top_2_plain(bench: Bench) -> dict[str, float]:
    # Dynamic routing does not renormalise; neither does this one.
    return run(bench, router_config={"norm_topk_prob": False})


def top_p(bench: Bench) -> dict[str, float]:
    return run(bench, router_type="top_p", router_config={"p": 0.4})


def top_p_at_two(bench: Bench) -> dict[str, float]:
    steer = SteerP(bench.train_blocks, target=K)
    return run(bench, [steer], router_type="top_p", router_config={"p": 0.4})


REPRODUCTION = Reproduction(
    name="dynamic_routing",
    papers=("2403.07652",),
    claim="Top-p routing beats top-2 while it activates fewer parameters.",
    arms={
        "top-2": top_2,
        "top-2, not renormalised": top_2_plain,
        "top-p, p = 0.4": top_p,
        "top-p, two on average": top_p_at_two,
    },
    baseline="top-2",
)
