"""Training MoSA adapters: two passes, their agreement, and what is left behind."""

import json

import pytest
import torch
from common.adapter_cases import tiny_bert, tiny_llama, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hf_moe import MosaConfig
from hf_moe.adapters.core import Bottleneck
from hf_moe.adapters.mosa.layer import MosaLayer
from hf_moe.trainers import MosaMergeCallback, MosaTrainer
from hf_moe.trainers.mosa_losses import feature_distance, symmetric_kl


def arguments(folder, **kwargs):
    settings = {
        "max_steps": 4, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "per_device_train_batch_size": 4,
        "seed": 0,
    }  # fmt: skip
    return TrainingArguments(folder, **{**settings, **kwargs})


def pictures(count=8):
    draw = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(1, 16, 16, generator=draw), "labels": i % 3} for i in range(count)]


def texts(count=8, masked=3):
    draw = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(2, 64, (8,), generator=draw)
        labels = ids.clone()
        labels[: masked + index % 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def vit(**fields):
    torch.manual_seed(0)
    return get_peft_model(tiny_vit(), MosaConfig(**{"r": 4, "dropout": 0.0, **fields}))


def llama(**fields):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), MosaConfig(**{"r": 4, "dropout": 0.0, "init_weights": False, **fields}))


def batch(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def test_symmetric_kl_by_hand():
    first, second = torch.tensor([[0.0, 0.0]]), torch.tensor([[torch.tensor(3.0).log().item(), 0.0]])
    torch.testing.assert_close(symmetric_kl(first, second), torch.tensor([0.1373266]))
    torch.testing.assert_close(symmetric_kl(second, second + 5.0), torch.zeros(1))


def test_symmetric_kl_pulls_each_pass_towards_the_other_one():
    first = torch.tensor([[0.0, 0.3, -1.0]], requires_grad=True)
    second = torch.tensor([[1.0, 0.0, 0.5]], requires_grad=True)
    symmetric_kl(first, second).sum().backward()
    p, q = first.detach().softmax(-1), second.detach().softmax(-1)
    torch.testing.assert_close(first.grad, 0.5 * (p - q))  # of KL(sg q || p) alone
    torch.testing.assert_close(second.grad, 0.5 * (q - p))


@pytest.mark.parametrize("alpha, beta", [(0.0, 1.0), (0.5, 0.0), (0.5, 2.0)])
def test_loss_is_the_papers(alpha, beta, tmp_path):
    model = vit(consistency_weight=beta, second_ce_weight=alpha, init_weights=False)
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures())
    inputs = batch(pictures(4))
    model.train()
    torch.manual_seed(1)
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    torch.manual_seed(1)
    first, second = (model(**inputs) for _ in range(2))
    assert torch.equal(outputs.logits, first.logits) and not torch.allclose(first.logits, second.logits)
    p, q = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
    kl = 0.5 * ((p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1)).mean()
    torch.testing.assert_close(loss, first.loss + alpha * second.loss + beta * kl)


def test_distance_of_block_outputs(tmp_path):
    states = [tuple(torch.full((2, 3), float(i * factor)) for i in range(13)) for factor in (1, 2)]
    # of twelve blocks every second one, which differ by their number
    assert feature_distance(*states).item() == pytest.approx(sum(i * i for i in (2, 4, 6, 8, 10, 12)) / 6)
    model = vit(consistency_weight=0.0, feature_weight=0.5, init_weights=False).train()
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures())
    inputs = batch(pictures(4))
    torch.manual_seed(1)
    loss = trainer.compute_loss(model, dict(inputs))
    torch.manual_seed(1)
    first, second = (model(**inputs, output_hidden_states=True) for _ in range(2))
    squares = [(a - b).square().mean() for a, b in zip(first.hidden_states, second.hidden_states, strict=True)]
    torch.testing.assert_close(loss, first.loss + 0.5 * (squares[1] + squares[2]) / 2)


def test_evaluation_and_zero_weights_take_one_pass(tmp_path):
    model = vit(init_weights=False)
    calls = []
    model.base_model.model.register_forward_hook(lambda *_: calls.append(1))
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures())
    inputs = batch(pictures(4))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), model(**inputs).loss)
    assert len(calls) == 2
    model.peft_config["default"].consistency_weight = 0.0
    trainer.compute_loss(model.train(), dict(inputs))
    assert len(calls) == 3
    model.peft_config["default"].consistency_weight = 1.0
    trainer.compute_loss(model, dict(inputs))
    assert len(calls) == 5


def test_one_expert_without_dropout_agrees_with_itself(tmp_path):
    model = vit(num_experts=1, init_weights=False).train()
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures())
    inputs = batch(pictures(4))
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), model(**inputs).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_items", [None, 17])
def test_language_models_agree_on_labelled_positions(num_items, tmp_path):
    model = llama().train()
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=texts())
    inputs = batch(texts(4))
    torch.manual_seed(1)
    loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items)
    torch.manual_seed(1)
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    first, second = (model(**inputs, **extra) for _ in range(2))
    total, count = 0.0, 0
    for row in range(4):
        for position in range(7):
            if inputs["labels"][row, position + 1] != -100:
                total = total + symmetric_kl(first.logits[row, position], second.logits[row, position])
                count += 1
    assert count == 4 * 5 - 2
    torch.testing.assert_close(loss, first.loss + total / (num_items or count))


def gradients(model, folder, rows, **kwargs):
    """Of one optimizer step, whatever the number of micro-batches."""
    found = {}

    class Kept(MosaTrainer):
        def _clip_grad_norm(self, model):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return super()._clip_grad_norm(model)

    Kept(model, arguments(folder, max_steps=1, **kwargs), train_dataset=rows).train()
    return found


def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path, monkeypatch):
    # both passes must draw alike in every micro-batch, so the experts are counted out: first 0, then 1
    calls = []

    def draw(self):
        self.calls = getattr(self, "calls", 0) + 1
        return torch.tensor([(self.calls - 1) % 2])

    monkeypatch.setattr("hf_moe.adapters.mosa.split.SplitLinear.draw", draw)
    whole = gradients(llama(), tmp_path, texts(8), per_device_train_batch_size=8)
    parts = gradients(llama(), tmp_path, texts(8), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert whole and not calls
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    alone = gradients(llama(consistency_weight=0.0), tmp_path, texts(8), per_device_train_batch_size=8)
    assert not torch.allclose(alone[next(iter(alone))], whole[next(iter(alone))], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, tmp_path):
    expected = gradients(llama(dropout=0.2), tmp_path, texts())
    checkpointing = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    torch.testing.assert_close(gradients(llama(dropout=0.2), tmp_path, texts(), **checkpointing), expected)
    seeded = gradients(llama(dropout=0.2, draw_seed=5), tmp_path, texts())
    torch.testing.assert_close(gradients(llama(dropout=0.2, draw_seed=5), tmp_path, texts(), **checkpointing), seeded)


def test_training_with_stock_models_learns_and_logs(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), MosaConfig(r=8, scale=1.0, modules_to_save=["classifier"]))
    ids = torch.randint(2, 64, (12, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]
    trainer = MosaTrainer(
        model,
        arguments(tmp_path, max_steps=40, learning_rate=5e-2, per_device_train_batch_size=12),
        train_dataset=rows,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "consistency_loss" in entry]
    assert len(logs) == 40 and all(entry["consistency_loss"] >= 0 for entry in logs)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def drawn(folder, seed, disturb=0, **kwargs):
    """Indices drawn while a model trains, with torch's generator disturbed as another process's would be."""
    found = []
    model = vit(draw_seed=seed, dropout=0.1)
    layers = [module.cell("cell", "default").up for module in model.modules() if isinstance(module, MosaLayer)]
    for layer in layers:
        before = layer.draw
        layer.draw = lambda before=before: found.append(before()) or found[-1]
    torch.manual_seed(disturb)

    class Disturbed(MosaTrainer):
        def training_step(self, *args, **kwargs):
            torch.rand(disturb + 1)
            return super().training_step(*args, **kwargs)

    Disturbed(model, arguments(folder, **kwargs), train_dataset=pictures()).train()
    return [int(index) for index in found]


def test_draws_can_be_shared_by_processes(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    first = drawn(tmp_path, 3, disturb=0, **settings)
    assert len(first) == 4 * 2 * 2 * 2 and len(set(first)) > 1  # steps, micro-batches, passes, layers
    assert drawn(tmp_path, 3, disturb=9, **settings) == first
    assert drawn(tmp_path, 4, disturb=0, **settings) != first
    assert drawn(tmp_path, None, disturb=9, **settings) != drawn(tmp_path, None, disturb=0, **settings)
    passes = [tuple(first[i : i + 2]) for i in range(0, len(first), 2)]
    assert passes[0::2] != passes[1::2]  # the second pass draws anew


def test_seeded_draws_leave_torchs_generator_alone(tmp_path):
    model = vit(draw_seed=3).train()
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures())
    state = torch.get_rng_state()
    trainer.compute_loss(model, batch(pictures(4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    def run(folder, steps, resume=None):
        model = vit(draw_seed=3, dropout=0.1)
        settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer = MosaTrainer(model, arguments(folder, max_steps=steps, **settings), train_dataset=pictures())
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    torch.testing.assert_close(run(tmp_path / "half", 4, str(tmp_path / "half" / "checkpoint-2")), whole)


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=batch(pictures(4))["pixel_values"]).logits


def test_callback_leaves_a_plain_adapter(tmp_path):
    model = vit()
    before = {}

    class Look(MosaMergeCallback):
        def on_train_end(self, *args, model=None, **kwargs):
            before["logits"] = logits(model)
            super().on_train_end(*args, model=model, **kwargs)

    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures(), callbacks=[Look()])
    trainer.train()
    cells = [module.cell("cell", "default") for module in model.modules() if isinstance(module, MosaLayer)]
    assert all(type(cell) is Bottleneck for cell in cells)
    torch.testing.assert_close(logits(model), before["logits"], rtol=0, atol=1e-5)
    trainer.save_model(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_vit(), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["num_experts"] == 1
    assert torch.equal(logits(again), logits(model))


def test_callback_writes_plain_copies_beside_checkpoints_and_training_goes_on(tmp_path):
    model = vit()
    callback = MosaMergeCallback(collapse=False, plain_copies=True)
    settings = {"save_strategy": "steps", "save_steps": 2}
    MosaTrainer(model, arguments(tmp_path, **settings), train_dataset=pictures(), callbacks=[callback]).train()
    assert model.peft_config["default"].num_experts == 4
    last = tmp_path / "checkpoint-4"
    split, plain = (PeftModel.from_pretrained(tiny_vit(), folder) for folder in (last, last / "plain"))
    assert split.peft_config["default"].num_experts == 4 and plain.peft_config["default"].num_experts == 1
    assert torch.equal(logits(split), logits(model))
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    earlier = PeftModel.from_pretrained(tiny_vit(), tmp_path / "checkpoint-2" / "plain")
    assert not torch.allclose(logits(earlier), logits(model), rtol=0, atol=1e-5)


def test_callback_and_trainer_want_a_sparse_adapter(tmp_path):
    lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="trains MoSA adapters"):
        MosaTrainer(lora, arguments(tmp_path), train_dataset=pictures())
    from transformers import Trainer

    trainer = Trainer(lora, arguments(tmp_path), train_dataset=pictures(), callbacks=[MosaMergeCallback()])
    with pytest.raises(ValueError, match="needs a model with a MoSA adapter"):
        trainer.train()


def test_a_model_with_an_adapter_of_its_own_trains(tmp_path):
    model = tiny_vit()
    model.add_adapter(MosaConfig(r=4), adapter_name="mine")
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures(), callbacks=[MosaMergeCallback()])
    trainer.train()
    assert model.peft_config["mine"].num_experts == 1
    with pytest.raises(ValueError, match="PEFT model"):
        callback = MosaMergeCallback(plain_copies=True)
        MosaTrainer(model, arguments(tmp_path), train_dataset=pictures(), callbacks=[callback]).train()


def test_losses_without_classes_are_refused(tmp_path):
    model = vit().train()
    trainer = MosaTrainer(model, arguments(tmp_path), train_dataset=pictures())
    model.base_model.model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"consistency_weight=0\.0"):
        inputs = batch(pictures(4))
        inputs["labels"] = nn.functional.one_hot(inputs["labels"]).float()
        trainer.compute_loss(model, inputs)
