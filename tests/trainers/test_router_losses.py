"""Loss and gradient of every path, against values computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from common.tiny_training import FAMILIES, build, expert_lora, third_party_warnings, tiny_moe
from torch.nn import functional as F

from hf_moe.views import record_routing, unwrap_model


pytestmark = third_party_warnings

KINDS = ["trainer", "sft", "dpo"]
# Dropped tokens depend on the micro-batch, and on whether a reference model is in training mode.
NO_CAPACITY = {"expert_capacity_factor": None}


@torch.no_grad()
def routing_by_hand(model, batch):
    """Per layer: counts (N,), mean probability (N,), eta (N,), mean squared logsumexp; tokens of the batch."""
    model = unwrap_model(model).train()
    mask = batch["attention_mask"].reshape(-1).bool()
    with record_routing(model) as recorder:
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    layers = []
    for layer in recorder.layers:
        logits, index = layer.router_logits[0][mask], layer.top_k_index[0][mask]
        num_experts = logits.shape[-1]
        eta = layer.view.router.balance_weights
        layers.append(
            SimpleNamespace(
                counts=torch.bincount(index.flatten(), minlength=num_experts + 1)[:num_experts].double(),
                mean=(logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)).mean(0),
                eta=torch.ones(num_experts) if eta is None else eta,
                z=logits.double().exp().sum(-1).log().square().mean(),
            )
        )
    return layers, int(mask.sum())


def losses_by_hand(layers, counts=None):
    """Balance loss and z-loss, means over layers; `counts` are those of the layers unless given."""
    counts = [layer.counts for layer in layers] if counts is None else counts
    values = [len(c) * (layer.eta * c / c.sum() * layer.mean).sum() for layer, c in zip(layers, counts, strict=True)]
    return float(sum(values) / len(values)), float(sum(layer.z for layer in layers) / len(layers))


@torch.no_grad()
def task_loss_by_hand(kind, model, batch, num_items):
    """Cross-entropy summed over the labels of the batch, over `num_items`; for DPO log 2, as policy and reference
    are the same model."""
    if kind == "dpo":
        return math.log(2)
    model = unwrap_model(model).eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    return float(F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="sum") / num_items)


def num_labels(batches):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches if "labels" in batch)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_task_loss_plus_each_router_loss_once(kind, family, lora, tmp_path):
    model = tiny_moe(family, **NO_CAPACITY, router_z_loss_coef=0.01)
    trainer = build(kind, tmp_path, model, lora=expert_lora() if lora else None, learning_rate=0.0)
    trainer.train()
    (batch,), ((loss,),) = trainer.batches[0], trainer.losses
    layers, num_tokens = routing_by_hand(trainer.model, batch)
    assert num_tokens < batch["input_ids"].numel()  # there is padding
    aux_loss, z_loss = losses_by_hand(layers)
    task_loss = task_loss_by_hand(kind, trainer.model, batch, num_labels([batch]))
    assert loss == pytest.approx(task_loss + 0.1 * aux_loss + 0.01 * z_loss, abs=1e-6)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, abs=1e-6)
    assert log["aux_loss"] == pytest.approx(aux_loss, abs=1e-6)
    assert log["router_z_loss"] == pytest.approx(z_loss, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_weigh_as_their_tokens_and_count_together(kind, tmp_path):
    trainer = build(kind, tmp_path, data=6, learning_rate=0.0, gradient_accumulation_steps=3, balance_mode="rank")
    trainer.train()
    batches, losses = trainer.batches[0], trainer.losses[0]
    routed = [routing_by_hand(trainer.model, batch) for batch in batches]
    tokens = [count for _, count in routed]
    assert len(set(tokens)) > 1
    seen = [torch.zeros(4, dtype=torch.float64) for _ in range(2)]
    logged = 0.0
    for batch, loss, (layers, count) in zip(batches, losses, routed, strict=True):
        seen = [total + layer.counts for total, layer in zip(seen, layers, strict=True)]
        aux_loss, _ = losses_by_hand(layers, seen)
        # DPO's loss is a mean over the micro-batch, which the Trainer divides by 3; the others come as their share.
        share = count / sum(tokens) * (3 if kind == "dpo" else 1)
        task_loss = task_loss_by_hand(kind, trainer.model, batch, num_labels(batches))
        assert loss == pytest.approx(task_loss + share * 0.1 * aux_loss, abs=1e-6)
        logged += loss / (3 if kind == "dpo" else 1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(logged, abs=1e-6)


@pytest.mark.parametrize(("family", "lora"), [("moe_llama", True), ("moe_plus_plus", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_does_not_change_the_gradient(kind, family, lora, tmp_path):
    def run(batch_size, accumulation, previous):
        model = tiny_moe(family, **NO_CAPACITY, balance_mode="lagged", router_z_loss_coef=0.01)
        if previous is not None:
            model.base_model.load_balancer.previous_counts.copy_(previous)
            model.base_model.load_balancer.previous_num_tokens.fill_(1)
        # Frozen routers have no gradient of their own; the router losses then train what is below them.
        adapter = expert_lora(target_modules=["q_proj"]) if lora else None
        size = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = build(kind, tmp_path, model, data=8, lora=adapter, **size)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_" in name:  # drawn from the global generator
                    parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
        trainer.train()
        assert trainer.announced == [accumulation]
        return trainer.gradients[0], trainer.state.log_history[0]["loss"], model.base_model.load_balancer

    # With G = W = 1 `lagged` uses the counts of the step; as previous ones, micro-batches use the very same.
    wanted, wanted_loss, balancer = run(8, 1, None)
    gradients, loss, _ = run(2, 4, balancer.previous_counts)
    assert loss == pytest.approx(wanted_loss, abs=1e-6)
    assert wanted.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=2e-6 * largest, rtol=1e-4, msg=name)


def router_part(kind, folder, extra=None, **options):
    """What the router losses add to the loss of one micro-batch, and the trainer that has them on."""
    found = []
    for coefficient in (0.0, 0.1):
        settings = {"learning_rate": 0.0, "router_aux_loss_coef": coefficient, **options}
        trainer = build(kind, folder, trainer=extra, **settings)
        trainer.train()
        found.append(trainer.losses[0][0])
    return found[1] - found[0], trainer


def mean_of_log_probs(outputs, labels, num_items_in_batch=None):
    log_probs = F.log_softmax(outputs.logits[:, :-1], dim=-1)
    assert outputs.aux_loss is None  # a loss function cannot add it a second time
    return -log_probs.mean(-1)[labels[:, 1:] != -100].sum() / num_items_in_batch


@pytest.mark.filterwarnings("ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated in `SFT:FutureWarning")
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated and will be:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "options", "extra"),
    [
        ("trainer", {"label_smoothing_factor": 0.1}, {}),
        ("trainer", {}, {"compute_loss_func": mean_of_log_probs}),
        ("trainer", {"average_tokens_across_devices": False}, {}),
        ("sft", {"label_smoothing_factor": 0.1}, {}),
        ("sft", {}, {"compute_loss_func": mean_of_log_probs}),
        ("sft", {"loss_type": "dft"}, {}),
        ("dpo", {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}, {}),
        ("dpo", {"precompute_ref_log_probs": True}, {}),
    ],
)
def test_every_other_loss_gets_the_same_router_losses(kind, options, extra, tmp_path):
    added, trainer = router_part(kind, tmp_path, extra, **options)
    layers, _ = routing_by_hand(trainer.model, trainer.batches[0][0])
    assert added == pytest.approx(0.1 * losses_by_hand(layers)[0], abs=2e-6)


def test_the_heterogeneous_loss_is_weighted(tmp_path):
    model = tiny_moe("moe_plus_plus", **NO_CAPACITY, router_tau=0.25)
    trainer = build("sft", tmp_path, model, learning_rate=0.0)
    trainer.train()
    layers, _ = routing_by_hand(model, trainer.batches[0][0])
    weighted, _ = losses_by_hand(layers)
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(weighted, abs=1e-6)
    for layer in layers:
        layer.eta = torch.ones_like(layer.eta)
    assert abs(losses_by_hand(layers)[0] - weighted) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_counted_once(kind, tmp_path):
    model = tiny_moe(balance_mode="running")
    # With an adapter the reference is the same module, with adapters disabled.
    trainer = build(kind, tmp_path, model, data=4, lora=expert_lora(), gradient_accumulation_steps=2)
    trainer.train()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in trainer.batches[0])
    assert model.base_model.load_balancer.previous_num_tokens == tokens
    assert model.base_model.load_balancer.previous_counts.sum(-1).tolist() == [2 * tokens] * 2


@pytest.mark.filterwarnings("ignore:.*flash.attention.*:UserWarning")
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_are_counted_without_mask_too(strategy, tmp_path):
    model = tiny_moe(balance_mode="running")
    options = {"packing": True, "packing_strategy": strategy, "max_length": 16, "gradient_accumulation_steps": 2}
    trainer = build("sft", tmp_path, model, data=12, **options)
    trainer.train()
    batches = trainer.batches[0]
    assert ("attention_mask" in batches[0]) == (strategy == "wrapped")
    tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
    assert model.base_model.load_balancer.previous_num_tokens == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_has_no_router_loss_and_counts_nothing(kind, tmp_path):
    model = tiny_moe(balance_mode="running", router_aux_loss_coef=10.0)
    data = build(kind, tmp_path, model).train_dataset
    trainer = build(kind, tmp_path, model, trainer={"eval_dataset": data}, learning_rate=0.0)
    before = trainer.evaluate()
    counters = [buffer.clone() for buffer in model.base_model.load_balancer.buffers()]
    assert not any(buffer.any() for buffer in counters)
    assert 0 < before["eval_loss"] < 7 < trainer.train().training_loss
    assert "aux_loss" not in before and "eval_aux_loss" not in before
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_formula_of_mixtral_is_never_computed(kind, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("Mixtral's auxiliary loss was computed")

    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", never)
    model = tiny_moe(output_router_logits=True)
    trainer = build(kind, tmp_path, model)  # the reference of DPO is a copy
    trainer.train()
    assert trainer.aux_loss_enabled is False and model.config.output_router_logits is False
    assert model.config.router_aux_loss_coef == 0.1  # as it was
    assert trainer.state.log_history[0]["aux_loss"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_router_losses_nothing_is_collected(kind, tmp_path, monkeypatch):
    model = tiny_moe(router_aux_loss_coef=0.0)
    monkeypatch.setattr(model.base_model.load_balancer, "begin", None)
    trainer = build(kind, tmp_path, model)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


def test_afterwards_the_model_adds_its_losses_itself(tmp_path):
    model = tiny_moe(router_aux_loss_coef=10.0)
    trainer = build("sft", tmp_path, model, learning_rate=0.0)
    trainer.train()
    batch = trainer.batches[0][0]
    assert model.train()(**batch).loss > 10 > model.eval()(**batch).loss
    assert vars(model).get("adds_router_losses") is None
    # Two trainers on one model, as in a notebook, do not count twice.
    again = build("sft", tmp_path, model, learning_rate=0.0)
    again.train()
    assert again.losses == trainer.losses


def test_dpo_takes_a_copy_of_a_model_in_memory_for_reference(tmp_path):
    model = tiny_moe()  # just made: there is nothing to load a reference from
    trainer = build("dpo", tmp_path, model, trainer={"ref_model": None}, data=8, max_steps=3)
    assert trainer.ref_model is not model and type(trainer.ref_model) is type(model)
    before = [parameter.clone() for parameter in trainer.ref_model.parameters()]
    trainer.train()
    assert trainer.losses[0][0] - 0.1 * trainer.state.log_history[0]["aux_loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )
    assert all(map(torch.equal, trainer.ref_model.parameters(), before))
    assert not all(map(torch.equal, model.parameters(), before))
    adapter = build("dpo", tmp_path, tiny_moe(), trainer={"ref_model": None}, lora=expert_lora())
    assert adapter.ref_model is None  # the policy with its adapter disabled
