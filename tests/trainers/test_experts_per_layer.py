"""Layers with different numbers of experts under our trainer: balance over the step, selection biases, logs."""

import pytest
import torch
from common.tiny_training import build, third_party_warnings, tiny_moe


pytestmark = third_party_warnings

COUNTS = [3, 6]
CONFIG = {
    "num_experts": COUNTS,
    "router_type": "sigmoid_topk",
    "router_bias_update_speed": 0.1,
    "router_aux_loss_coef": 1.0,
}


def trained(folder, batch=2, accumulation=2, **options):
    model = tiny_moe(**CONFIG)
    balancer = model.base_model.load_balancer
    balancer.previous_counts.copy_(torch.tensor([[3, 5, 1, 0, 0, 0], [1, 2, 3, 1, 1, 1]]))
    balancer.previous_num_tokens.fill_(4)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = build("trainer", folder, model, data=8, **sizes, **options)
    trainer.train()
    return trainer


def test_accumulation_does_not_change_the_gradients(tmp_path):
    options = {"balance_mode": "lagged", "max_steps": 2, "optim": "sgd"}
    whole = trained(tmp_path, 2, 2, **options)  # with one micro-batch, `lagged` takes its own counts
    parts = trained(tmp_path, 1, 4, **options)
    for one, other in zip(whole.gradients, parts.gradients, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["running", "lagged", "blend"])
def test_each_layer_counts_and_moves_its_own_experts(mode, tmp_path):
    trainer = trained(tmp_path, balance_mode=mode)
    counts = trainer.model.base_model.load_balancer.previous_counts
    assert counts.shape == (2, 6) and (counts[0, 3:] == 0).all() and (counts.sum(-1) == counts[0].sum()).all()
    biases = [block.gate.e_score_correction_bias for _, block in trainer.model.moe_blocks()]
    assert [len(bias) for bias in biases] == COUNTS and all(bias.any() for bias in biases)
    assert trainer.state.log_history[0]["aux_loss"] > 0
