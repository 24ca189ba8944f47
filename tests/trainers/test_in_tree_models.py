"""Models of transformers under our trainers: one balance loss, ours, in place of their own."""

import pytest
import torch
from common.tiny_families import tiny_model
from common.tiny_training import VOCAB, build, expert_lora, third_party_warnings

from hf_moe import upcycle
from hf_moe.views import record_routing, unwrap_model


pytestmark = third_party_warnings

# Softmax scores and an auxiliary loss of their own; sigmoid scores, a dense first layer and none.
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")


def balance_loss_by_hand(model, batch):
    model = unwrap_model(model).train()
    mask = batch["attention_mask"].reshape(-1).bool()
    with torch.no_grad(), record_routing(model) as recorder:
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    values = []
    for layer in recorder.layers:
        logits, index = layer.router_logits[0][mask].float(), layer.top_k_index[0][mask]
        scores = logits.softmax(-1) if layer.view.rule.score == "softmax" else logits.sigmoid()
        counts = torch.bincount(index.flatten(), minlength=logits.shape[-1]).float()
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        values.append(len(counts) * float(counts / counts.sum() @ mean))
    return sum(values) / len(values)


@pytest.mark.parametrize(("family", "lora"), [*((family, False) for family in FAMILIES), ("mixtral", True)])
@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_the_balance_loss_is_added_once(kind, family, lora, tmp_path):
    found = []
    for coefficient in (0.0, 0.5):
        model = tiny_model(family, vocab_size=VOCAB)
        adapter = expert_lora() if lora else None
        if hasattr(model.config, "output_router_logits"):
            model.config.output_router_logits = True  # their own loss would be added by the stock Trainer
        trainer = build(kind, tmp_path, model, lora=adapter, learning_rate=0.0, router_aux_loss_coef=coefficient)
        trainer.train()
        found.append(trainer.losses[0][0])
    expected = balance_loss_by_hand(trainer.model, trainer.batches[0][0])
    assert found[1] - found[0] == pytest.approx(0.5 * expected, abs=2e-6)
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("kind", "family"), [("trainer", "mixtral"), ("sft", "qwen3_moe")])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(kind, family, tmp_path):
    def run(steps, folder, resume=None):
        options = {"balance_mode": "lagged", "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.01, "data": 12}
        options |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
        model = tiny_model(family, vocab_size=VOCAB)
        trainer = build(kind, tmp_path / folder, model, max_steps=steps, lr_scheduler_type="constant", **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(4, "whole")
    run(2, "part")
    resumed = run(4, "part", resume=True)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in whole.batches[3])
    assert whole.model.load_balancer.previous_num_tokens == tokens
    for (name, wanted), (_, found) in zip(
        [*whole.model.named_parameters(), *whole.model.named_buffers()],
        [*resumed.model.named_parameters(), *resumed.model.named_buffers()],
        strict=True,
    ):
        assert torch.equal(found, wanted), name
    assert not any("load_balancer" in name for name in whole.model.state_dict())


def test_the_best_model_is_loaded_with_its_experts(tmp_path):
    model = tiny_model("mixtral", vocab_size=VOCAB)
    rows = build("trainer", tmp_path, model).train_dataset
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # So large a learning rate that the first step is the best.
    options = {"max_steps": 3, "learning_rate": 1.0, "lr_scheduler_type": "constant", "load_best_model_at_end": True}
    trainer = build("trainer", tmp_path, model, trainer={"eval_dataset": rows}, **saving, **options)
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.state.best_global_step < 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_what_upcycle_makes_by_default_can_be_trained(tmp_path, tiny_llama):
    model, report = upcycle(tiny_llama, num_experts=4, top_k=2)
    assert report.target == "mixtral"
    trainer = build("sft", tmp_path, model, data=2, max_steps=8, balance_mode="running", router_aux_loss_coef=0.1)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    again = build("sft", tmp_path, model)  # a second trainer finds the balancer of the first
    again.train()
    assert sum("load_balancer" in name for name, _ in model.named_modules()) == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_loss(tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = build("trainer", tmp_path, tiny_model("mixtral", vocab_size=VOCAB), router_aux_loss_coef=0.1, **options)
    with pytest.raises(ValueError, match=r"no router of the model ran with gradients.*'use_reentrant': False"):
        trainer.train()
