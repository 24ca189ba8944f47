"""Balance over the whole optimizer step against balance in every micro-batch, each of which has text of one domain.

A micro-batch of one domain that must use all experts equally cannot have experts for its domain. All arms take the
same micro-batches in the same order, with the same weight of the balance loss.

Shapes: L MoE layers, N experts.
"""

from functools import partial
from itertools import combinations
from typing import Any

import torch
from harness import Bench, Reproduction


__all__ = ["REPRODUCTION"]

#: Weight of the balance loss. Large enough for the loss to be felt in so few steps.
COEFFICIENT = 0.1


def sorted_blocks(bench: Bench, micro_batch: int) -> torch.Tensor:
    """Training blocks such that each micro-batch is of one domain and each step has one of every domain, `(M, S)`."""
    generator = torch.Generator().manual_seed(bench.seed)
    number = min(len(blocks) for blocks in bench.domains.values()) // micro_batch * micro_batch
    shuffled = [blocks[torch.randperm(len(blocks), generator=generator)[:number]] for blocks in bench.domains.values()]
    return torch.stack([blocks.unflatten(0, (-1, micro_batch)) for blocks in shuffled], dim=1).flatten(0, 2)


@torch.no_grad()
def expert_load(bench: Bench, model: Any) -> torch.Tensor:
    """Share of each domain's held-out tokens that each expert gets, `(domains, L, N)`."""
    loads = []
    model.eval()
    for blocks in bench.held_out.values():
        chosen = model(input_ids=blocks, output_router_logits=True, use_cache=False).router_indices
        counts = torch.stack([index.flatten().bincount(minlength=model.config.num_experts) for index in chosen])
        loads.append(counts / counts.sum(-1, keepdim=True))
    return torch.stack(loads)


def run(bench: Bench, mode: str, coefficient: float = COEFFICIENT) -> dict[str, float]:
    """Held-out bits per byte; how far apart the domains' loads are; how uneven the load of all together is.

    Args:
        bench ([`Bench`]): Preset and seed.
        mode (`str`): `balance_mode`.
        coefficient (`float`): Weight of the balance loss.
    """
    domains = len(bench.domains)
    micro_batch = max(2, bench.preset.batch_size // domains)
    model = bench.language_model(
        num_experts=bench.preset.scale(8, 32, tiny=4),
        num_experts_per_tok=2,
        balance_mode=mode,
        router_aux_loss_coef=coefficient,
    )
    bench.train(
        model,
        # As many tokens as in all other reproductions.
        steps=max(2, bench.preset.steps * bench.preset.batch_size // (micro_batch * domains)),
        data=sorted_blocks(bench, micro_batch),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=domains,
    )
    loads = expert_load(bench, model)
    pairs = [(loads[a] - loads[b]).abs().sum(-1).mean() / 2 for a, b in combinations(range(domains), 2)]
    together = loads.mean(0)  # (L, N)
    return {
        "bits_per_byte": bench.evaluate(model),
        "distance_of_domains": float(torch.stack(pairs).mean()),  # 0: alike, 1: no expert in common
        "busiest_expert": float((together.max(-1).values * together.shape[-1]).mean()),  # 1: balanced
    }


REPRODUCTION = Reproduction(
    name="global_batch_balance",
    papers=("2501.11873",),
    claim="With frequencies of the whole step, experts specialise in domains and the held-out loss is lower, while "
    "the load of all text together stays balanced.",
    arms={
        "micro-batch": partial(run, mode="micro"),
        "step (running)": partial(run, mode="running"),
        "step before (lagged)": partial(run, mode="lagged"),
        "no balance loss": partial(run, mode="micro", coefficient=0.0),
    },
    baseline="micro-batch",
)
