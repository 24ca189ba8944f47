"""Activation checkpointing, bf16, compilation, and that training trains."""

import pytest
import torch
from common.tiny_training import FAMILIES, build, expert_lora, third_party_warnings, tiny_moe

from hf_moe.trainers import RouterLossCollector


pytestmark = third_party_warnings

KINDS = ["trainer", "sft", "dpo"]
CASES = [("moe_llama", False), ("moe_llama", True), ("moe_plus_plus", False)]


@pytest.mark.parametrize(("family", "lora"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(kind, family, lora, tmp_path):
    found = []
    for checkpointing in (False, True):
        model = tiny_moe(family, balance_mode="running", router_z_loss_coef=0.01)
        adapter = expert_lora(target_modules=["q_proj"]) if lora else None
        torch.manual_seed(0)  # adapters are drawn from the global generator
        trainer = build(
            kind, tmp_path, model, lora=adapter, gradient_accumulation_steps=2, activation_checkpointing=checkpointing
        )
        trainer.train()
        assert model.base_model.layers[0].gradient_checkpointing is checkpointing
        found.append((trainer.losses, trainer.gradients[0], list(model.base_model.load_balancer.buffers())))
    (losses, gradients, buffers), (own_losses, own_gradients, own_buffers) = found
    assert own_losses == losses
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, atol=1e-7, rtol=1e-5, msg=name)
    assert all(map(torch.equal, own_buffers, buffers)) and buffers[0].any()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_reentrant_checkpointing_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"'use_reentrant': True.*would drop the gradient of the router losses"):
        build(
            kind,
            tmp_path,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        ).train()


@pytest.mark.parametrize(("family", "lora"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind, family, lora, tmp_path):
    adapter = expert_lora(r=8, lora_alpha=64) if lora else None
    options = {"data": 2, "max_steps": 8, "learning_rate": 0.02, "balance_mode": "lagged"}
    trainer = build(kind, tmp_path, tiny_moe(family), lora=adapter, **options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.9 * losses[0]


def test_the_balance_loss_balances(tmp_path):
    # A router that sends everything to expert 0 and 1, and nothing else to learn.
    model = tiny_moe(router_aux_loss_coef=1.0, balance_mode="running")
    for _, block in model.moe_blocks():
        with torch.no_grad():
            block.gate.weight.copy_(block.gate.weight[:1] + 0.1 * block.gate.weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate" in name)
    trainer = build("trainer", tmp_path, model, data=8, max_steps=30, per_device_train_batch_size=8)
    trainer.train()
    logs = [log["aux_loss"] for log in trainer.state.log_history if "aux_loss" in log]
    assert logs[-1] < 1 + 0.5 * (logs[0] - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_trains_with_routers_in_fp32(kind, family, tmp_path):
    model = tiny_moe(family, router_z_loss_coef=0.01)
    trainer = build(kind, tmp_path, model, bf16=True, data=2, max_steps=8, learning_rate=0.02)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.9 * losses[0]
    assert model.moe_blocks()[0][1].gate.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_bf16_train(kind, tmp_path):
    model = tiny_moe("moe_plus_plus").to(torch.bfloat16)
    trainer = build(kind, tmp_path, model, data=2, max_steps=8, learning_rate=0.02)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.9 * losses[0]
    # Router losses do not round to the steps of bf16, which are 2**-7 at 1.
    assert (trainer.state.log_history[0]["aux_loss"] * 2**8) % 1 != 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_a_compiled_model_has_the_same_losses(kind, tmp_path):
    found = []
    for compiled in (False, True):
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        model = tiny_moe(balance_mode="running", router_z_loss_coef=0.01, experts_implementation="batched_mm")
        trainer = build(kind, tmp_path, model, data=8, gradient_accumulation_steps=2, max_steps=2, **options)
        trainer.train()
        assert model.base_model.load_balancer.previous_num_tokens > 0
        found.append([loss for step in trainer.losses for loss in step])
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_router_losses_are_collected_without_graph_break():
    model = tiny_moe(balance_mode="running", experts_implementation="batched_mm").train()
    collector = RouterLossCollector(model)
    ids = torch.arange(3, 23).view(2, 10)
    found = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.base_model.load_balancer.begin_step(1, 20)
        with collector.collect() as pending:
            loss = forward(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        (part,) = pending
        loss = loss + part.finish(num_items_in_batch=1).total(0.5)
        found.append((loss, torch.autograd.grad(loss, model.base_model.layers[0].mlp.gate.weight)[0]))
    (eager, gradient), (compiled, own_gradient) = found
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(own_gradient, gradient)
