"""Z-code M3: random token selection, aggregation of experts, and pruning, at equal budgets of tokens.

Every arm trains for the steps of the preset in three stretches, with a warm-up each: a common beginning, a middle and
an end on all domains. In the aggregated arm the middle part is two branches that see half of the domains each, for
half of its steps; their experts are then put into one model. What is lost when half of the experts go, by use or at
random, is measured at once, before any fine-tuning would hide it.
"""

from functools import partial
from typing import Any

import torch
from harness import Bench, Reproduction

from hf_moe.upcycling import aggregate_experts, expert_usage, prune_experts


NUM_EXPERTS = 4
#: Shares of the steps.
BEGINNING, MIDDLE, END = 0.4, 0.4, 0.2
#: Batches of training text the use of experts is counted on.
USAGE_BATCHES = 8


def model_of(bench: Bench, num_experts: int = NUM_EXPERTS, **fields: Any) -> Any:
    """Top-1 routing with the probability as weight, as in Z-code, times N: an expert starts at full size."""
    weights = {"norm_topk_prob": False, "routed_scaling_factor": float(num_experts)}
    options = {**weights, **fields.pop("router_config", {})}
    return bench.language_model(num_experts=num_experts, num_experts_per_tok=1, router_config=options, **fields)


def steps(bench: Bench, share: float) -> int:
    return max(1, round(share * bench.preset.steps))


def part(bench: Bench, number: int) -> torch.Tensor:
    """Training text of one stretch, no block twice as long as there are enough."""
    blocks = bench.train_blocks
    return blocks.roll(-number * len(blocks) // 3, dims=0)


def continued(bench: Bench, num_experts: int = NUM_EXPERTS, **fields: Any) -> dict[str, float]:
    model = model_of(bench, num_experts, **fields)
    for number, share in enumerate((BEGINNING, MIDDLE, END)):
        bench.train(model, steps=steps(bench, share), data=part(bench, number))
    return figures(bench, model)


def aggregated(bench: Bench) -> dict[str, float]:
    first = model_of(bench)
    bench.train(first, steps=steps(bench, BEGINNING), data=part(bench, 0))
    second = bench.seeded(lambda: type(first)(first.config))
    second.load_state_dict(first.state_dict())
    names = sorted(bench.domains)
    for branch, chosen in ((first, names[: len(names) // 2]), (second, names[len(names) // 2 :])):
        text = torch.cat([bench.domains[name] for name in chosen])
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(bench.seed))
        bench.train(branch, steps=steps(bench, MIDDLE / 2), data=text[order])
    model = aggregate_experts(first, second)
    bench.train(model, steps=steps(bench, END), data=part(bench, 2))
    return figures(bench, model)


def figures(bench: Bench, model: Any) -> dict[str, float]:
    """Held-out loss of the model, and with half of its experts."""
    batches = [{"input_ids": batch} for batch in bench.train_blocks[-USAGE_BATCHES * 16 :].split(16)]
    usage = expert_usage(model, batches)
    row = {"bits_per_byte": bench.evaluate(model)}
    for policy in ("load", "random"):
        kept = model.config.num_experts // 2
        half = prune_experts(model, num_experts=kept, usage=usage, policy=policy, seed=bench.seed)
        row[f"half_by_{policy}"] = bench.evaluate(half)
    return row


CAPACITY = {"expert_capacity_factor": 1.0}
REPRODUCTION = Reproduction(
    name="zcode",
    papers=("2109.10465",),
    claim="Where capacity drops tokens, dropping random ones is better than dropping the last ones; aggregating the "
    "experts of two branches beats going on with one model; pruning by use beats pruning at random.",
    arms={
        "one model": continued,
        "one model, last dropped": partial(continued, **CAPACITY, router_config={"capacity_policy": "order"}),
        "one model, random dropped": partial(continued, **CAPACITY, router_config={"capacity_policy": "random"}),
        "twice the experts": partial(continued, num_experts=2 * NUM_EXPERTS),
        "two branches aggregated": aggregated,
    },
    baseline="one model",
)
