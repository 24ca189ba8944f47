"""MoTE: ternary routed experts beside the frozen dense feed-forward, against experts in full precision.

A dense model is trained for half of the steps; then it is upcycled, and only routers and routed experts are trained
for the other half, in all arms alike.
"""

from typing import Any

from harness import Bench, Reproduction


__all__ = ["REPRODUCTION"]


def upcycled(bench: Bench, num_experts: int, ternary: bool) -> tuple[Any, float]:
    """The trained Mixture-of-Experts, and the MiB of its routed experts when it is used (bfloat16, or 2 bits)."""
    import hf_moe
    from hf_moe.experts import SwiGLUExperts
    from hf_moe.routing import BaseRouter
    from hf_moe.trainers import MoteTrainer

    dense = bench.dense_model()
    steps = bench.preset.steps // 2
    bench.train(dense, steps=steps)
    options = {"check": False, "seed": bench.seed, "target": "moe_llama"}
    rest = bench.train_blocks[steps * bench.preset.batch_size :]
    if ternary:
        moe, _ = hf_moe.upcycle_mote(dense, num_experts=num_experts, **options)
        bench.train(moe, steps=steps, data=rest, trainer_class=MoteTrainer)
        return moe, 0.0
    moe, _ = hf_moe.upcycle(
        dense, num_experts=num_experts, top_k=1, shared="dense", weights="softmax", scale=1.0, **options
    )
    moe.requires_grad_(False)
    for module in moe.modules():
        if isinstance(module, (SwiGLUExperts, BaseRouter)):
            module.requires_grad_(True)
    bench.train(moe, steps=steps, data=rest)
    banks = [module for module in moe.modules() if isinstance(module, SwiGLUExperts)]
    return moe, sum(2 * p.numel() for bank in banks for p in bank.parameters()) / 2**20


def in_full_precision(bench: Bench, num_experts: int) -> dict[str, float]:
    """Experts as they are, counted as bfloat16."""
    moe, size = upcycled(bench, num_experts, ternary=False)
    return {"bits_per_byte": bench.evaluate(moe), "experts_mib": size}


def rounded_afterwards(bench: Bench) -> dict[str, float]:
    """Experts trained in full precision whose weights are rounded when training is over."""
    import torch

    from hf_moe.experts import SwiGLUExperts
    from hf_moe.experts.ternary_rounding import round_weights

    moe, size = upcycled(bench, 4, ternary=False)
    with torch.no_grad():
        for bank in (module for module in moe.modules() if isinstance(module, SwiGLUExperts)):
            bank.gate_up_proj.copy_(round_weights(bank.gate_up_proj.detach().unflatten(1, (2, -1))).flatten(1, 2))
            bank.down_proj.copy_(round_weights(bank.down_proj.detach()))
    return {"bits_per_byte": bench.evaluate(moe), "experts_mib": size / 8}


def ternary(bench: Bench, num_experts: int) -> dict[str, float]:
    """Ternary experts, measured as they are used: packed."""
    from hf_moe import export_ternary

    moe, _ = upcycled(bench, num_experts, ternary=True)
    report = export_ternary(moe)
    return {"bits_per_byte": bench.evaluate(moe), "experts_mib": report.bytes_after / 2**20}


REPRODUCTION = Reproduction(
    name="mote",
    papers=("2506.14435",),
    claim="Ternary experts come close to experts in full precision at an eighth of their memory, and more of them in "
    "the same memory do better than few in full precision.",
    arms={
        "4 experts": lambda bench: in_full_precision(bench, 4),
        "4 ternary": lambda bench: ternary(bench, 4),
        "4 rounded afterwards": rounded_afterwards,
        "1 expert": lambda bench: in_full_precision(bench, 1),
        "8 ternary": lambda bench: ternary(bench, 8),
    },
    baseline="4 experts",
)
