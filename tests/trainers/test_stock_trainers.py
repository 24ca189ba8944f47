"""The trainers of transformers and TRL, unmodified: what they make of our models' router losses."""

import pytest
import torch
from common.tiny_training import FAMILIES, build, expert_lora, third_party_warnings, tiny_moe, tiny_upcycled
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.views import record_routing, unwrap_model


pytestmark = third_party_warnings


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_stock_trainers_train(kind, family, lora, tmp_path):
    adapter = expert_lora() if lora else None
    trainer = build(
        kind, tmp_path, tiny_moe(family), stock=True, lora=adapter, max_steps=8, data=2, learning_rate=0.02
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_takes_mixtrals_formula_over_feed_forward_experts(kind, family, tmp_path):
    trainer = build(kind, tmp_path, tiny_moe(family, expert_capacity_factor=None), stock=True, learning_rate=0.0)
    trainer.train()
    batch = trainer.batches[0][0]
    model = unwrap_model(trainer.model)
    with torch.no_grad(), record_routing(model) as recorder:
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = tuple(layer.router_logits[0][:, :4] for layer in recorder.layers)
    expected = load_balancing_loss_func(logits, 4, 2, batch["attention_mask"])
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trls_pooled_loss_refuses_layers_of_different_sizes_and_names_the_way_out(kind, tmp_path):
    trainer = build(kind, tmp_path, tiny_moe(num_experts=[2, 4]), stock=True)
    with pytest.raises(ValueError, match=r"`num_experts` is \[2, 4\], .* Use `MoeSFTTrainer`"):
        trainer.train()
    for stock, options in ((True, {"router_aux_loss_coef": 0.0}), (False, {})):
        trainer = build(kind, tmp_path, tiny_moe(num_experts=[2, 4]), stock=stock, **options)
        trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models_say_all_router_logits_beside_those_third_parties_read(family):
    model = tiny_moe(family).eval()
    ids = torch.arange(3, 11).view(1, 8)
    outputs = model.base_model(ids, output_router_logits=True)
    targets = model.config.num_routing_targets
    assert all(logits.shape == (8, 4) for logits in outputs.router_logits)
    assert all(logits.shape == (8, targets) for logits in outputs.all_router_logits)
    for few, every in zip(outputs.router_logits, outputs.all_router_logits, strict=True):
        assert torch.equal(few, every[:, :4])
    head = model(ids, output_router_logits=True)
    assert all(map(torch.equal, head.router_logits, outputs.all_router_logits))


def test_stock_trainer_and_ours_are_one_where_every_token_has_a_label(tmp_path):
    found = []
    for stock in (True, False):
        # Position 0 has no label in any row, so labels and tokens have the same share in every micro-batch.
        model = tiny_moe("moe_plus_plus", router_z_loss_coef=0.01)
        rows = build("trainer", tmp_path, data=8, stock=True).train_dataset
        rows = [{**row, "labels": row["input_ids"], "attention_mask": torch.ones(10)} for row in rows]
        trainer = build("trainer", tmp_path, model, data=rows, stock=stock, gradient_accumulation_steps=2, max_steps=2)
        trainer.train()
        found.append((trainer.losses, [parameter.detach() for parameter in model.parameters()]))
    (losses, wanted), (own_losses, parameters) = found
    for step, own in zip(losses, own_losses, strict=True):
        assert own == pytest.approx(step, abs=1e-6)
    for a, b in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_generically_upcycled_models_train_too(kind, stock, tmp_path):
    model = tiny_upcycled()
    trainer = build(kind, tmp_path, model, stock=stock, gradient_accumulation_steps=2)
    trainer.train()
    routers = [name for name in trainer.gradients[0] if name.endswith("gate.weight")]
    assert len(routers) == 2 and all(trainer.gradients[0][name].abs().max() > 0 for name in routers)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in trainer.batches[0])
    if not (stock and kind == "trainer"):
        # Mixtral's value is K when balanced, ours 1; a router just made is nearly balanced.
        balanced = 2 if stock else 1
        assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(balanced, abs=0.3)
    if not stock:
        trainer = build(kind, tmp_path, model, balance_mode="lagged", gradient_accumulation_steps=2)
        trainer.train()
        assert model.load_balancer.previous_num_tokens == tokens
