"""Trainers log the experts in use and count, of the experts, only those."""

import pytest
import torch
from common.tiny_training import build, third_party_warnings, tiny_moe, tiny_upcycled, token_rows


pytestmark = third_party_warnings

TOP_P = {"router_type": "top_p", "router_aux_loss_coef": 0.0, "router_config": {"p": 0.6, "entropy_coef": 0.0}}


def expert_size(model):
    bank = model.model.layers[0].mlp.experts
    return sum(p.numel() for p in bank.parameters()) // bank.num_experts


def used_in(model, batch):
    """Active slots of all layers, and tokens, of a batch."""
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels"}, output_router_logits=True)
    return sum((index < 4).sum().item() for index in out.router_indices), int(batch["attention_mask"].sum())


@pytest.mark.parametrize("options", [{}, TOP_P], ids=["top_2", "top_p"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_flops_and_active_experts_are_those_of_the_experts_in_use(options, accumulation, tmp_path):
    model = tiny_moe(**options)
    trainer = build(
        "trainer", tmp_path, model, data=8, max_steps=2, learning_rate=0.0, gradient_accumulation_steps=accumulation
    )
    routed = 2 * 4 * expert_size(model)
    dense = model.num_parameters(exclude_embeddings=True) - routed
    trainer.train()
    batches = [batch for step in trainer.batches for batch in step]
    assert len(batches) == 2 * accumulation
    found = [used_in(model.train(), batch) for batch in batches]
    positions = sum(batch["input_ids"].numel() for batch in batches)
    slots, tokens = (sum(column) for column in zip(*found, strict=True))
    assert trainer.state.total_flos == 6 * (positions * dense + slots * expert_size(model))
    assert trainer.state.total_flos < 6 * positions * (dense + routed)
    logs = [log["active_experts"] for log in trainer.state.log_history if "loss" in log]
    if options:
        assert 1 < slots / (2 * tokens) < 4 and slots != 2 * 2 * tokens
    first = found[:accumulation]
    assert logs[0] == pytest.approx(sum(s for s, _ in first) / (2 * sum(t for _, t in first)), rel=1e-6)


def test_fewer_experts_cost_less(tmp_path):
    costs = {}
    for k in (1, 2, 4):
        model = tiny_moe(num_experts_per_tok=k, router_type="fixed_random", router_aux_loss_coef=0.0)
        trainer = build("trainer", tmp_path, model, data=token_rows(4, pad=False), max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["active_experts"] == k
        costs[k] = trainer.state.total_flos
    assert costs[4] - costs[2] == 2 * (costs[2] - costs[1]) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_routers_twice_and_counts_them_once(checkpointing, tmp_path):
    trainer = build("trainer", tmp_path, tiny_moe(), data=4, gradient_checkpointing=checkpointing)
    trainer.train()
    assert trainer.state.log_history[0]["active_experts"] == 2.0
    assert trainer.state.total_flos == build_flops(tmp_path)


def build_flops(folder):
    trainer = build("trainer", folder, tiny_moe(), data=4)
    trainer.train()
    return trainer.state.total_flos


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trainers_log_them_too(kind, tmp_path):
    trainer = build(kind, tmp_path, tiny_moe(), data=4)
    trainer.train()
    assert trainer.state.log_history[0]["active_experts"] == 2.0


def test_a_type_without_a_backbone_of_ours_is_counted(tmp_path):
    trainer = build("trainer", tmp_path, tiny_upcycled(), data=token_rows(4, pad=False))
    trainer.train()
    assert trainer.state.log_history[0]["active_experts"] == 2.0
    model = trainer.model
    assert 0 < trainer.state.total_flos < 6 * 20 * model.num_parameters(exclude_embeddings=True)
