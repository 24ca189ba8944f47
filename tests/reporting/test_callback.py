"""Routing in the Trainer's logs: the right tokens, counted once, under a bounded number of keys."""

import pytest
import torch
from common.tiny_families import tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe import moe_layers
from hf_moe.reporting import ExpertLoadCallback
from hf_moe.reporting.callback import TrainingRecorder
from hf_moe.routing.balance import expert_frequency


KEYS = {
    f"routing/{key}"
    for key in (
        "active_experts",
        "dead_share",
        "entropy",
        "load_entropy",
        "max_violation",
        "max_violation_worst_layer",
    )
}


def rows(generator, count=8, length=12):
    ids = torch.randint(3, 384, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(folder, **{**defaults, **options})


def routing_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_history_has_the_bounded_keys(tmp_path, generator):
    trainer = Trainer(
        tiny_model("mixtral"), arguments(tmp_path), train_dataset=rows(generator), callbacks=[ExpertLoadCallback()]
    )
    trainer.train()
    for entry in routing_logs(trainer):
        assert {key for key in entry if key.startswith("routing/")} == KEYS
    assert len(routing_logs(trainer)) == 2
    assert not any("routing/entropy" in entry for entry in trainer.state.log_history if "train_runtime" in entry)


def test_per_layer_keys_are_limited(tmp_path, generator):
    model = tiny_model("mixtral")  # 4 MoE layers
    callback = ExpertLoadCallback(per_layer=2)
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(generator), callbacks=[callback])
    trainer.train()
    extra = {key for key in routing_logs(trainer)[0] if key.startswith("routing/")} - KEYS
    assert extra == {f"routing/layer_{i}/{key}" for i in (0, 3) for key in ("max_violation", "entropy")}


@pytest.mark.parametrize("accumulation,checkpointing", [(1, False), (2, False), (1, True)])
def test_logged_violation_is_that_of_the_training_batches(tmp_path, generator, accumulation, checkpointing):
    # One pass over the data with learning rate 0: the routing of all rows, however they are batched or recomputed.
    model, data = tiny_model("mixtral"), rows(generator)
    with torch.no_grad():
        for view in moe_layers(model):
            view.router.weight.mul_(50)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    steps = 4 // accumulation
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=steps, logging_steps=steps, gradient_accumulation_steps=accumulation),
        train_dataset=data,
        callbacks=[ExpertLoadCallback()],
    )
    trainer.train()
    logged = routing_logs(trainer)[0]
    recorder = TrainingRecorder(model)
    model.train()
    model(input_ids=torch.stack([row["input_ids"] for row in data]), use_cache=False)
    expected = recorder.drain()
    recorder.close()
    assert {key: logged[key] for key in KEYS} == pytest.approx(expected)
    assert logged["routing/max_violation"] > 0.1


def test_padding_is_not_counted(generator):
    model = tiny_model("mixtral").train()
    input_ids = torch.randint(3, 384, (2, 10), generator=generator)
    recorder = TrainingRecorder(model)
    model(input_ids=input_ids, use_cache=False)
    clean = recorder.drain(per_layer=4)
    padded = torch.cat([input_ids, torch.zeros(2, 6, dtype=torch.int64)], dim=1)
    mask = torch.arange(16).lt(10).long().expand(2, 16)
    model(input_ids=padded, attention_mask=mask, use_cache=False)
    assert recorder.drain(per_layer=4) == pytest.approx(clean, rel=1e-5)
    recorder.close()


def test_only_training_passes_with_gradients_count(generator):
    model = tiny_model("mixtral").train()
    recorder = TrainingRecorder(model)
    input_ids = torch.randint(3, 384, (2, 10), generator=generator)
    with torch.no_grad():  # a reference model, a metric
        model(input_ids=input_ids)
    model.eval()
    model(input_ids=input_ids)
    assert recorder.drain() == {}
    recorder.close()


def test_recomputed_layers_count_once(generator):
    model = tiny_model("mixtral").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    recorder = TrainingRecorder(model)
    input_ids = torch.randint(3, 384, (2, 10), generator=generator)
    for _ in range(2):
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    assert recorder.stats.compute().num_tokens == 40
    recorder.close()


def test_an_aborted_forward_leaves_nothing_behind(generator):
    model = tiny_model("mixtral").train()
    recorder = TrainingRecorder(model)
    input_ids = torch.randint(3, 384, (1, 10), generator=generator)

    def stop(*_args):
        raise RuntimeError("out of memory")

    handle = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=input_ids)
    handle.remove()
    model(input_ids=input_ids[:, :4], use_cache=False)
    assert recorder.stats.compute().num_tokens == 4
    recorder.close()


def test_statistics_are_per_layer_not_pooled(generator):
    # Two layers that collapsed onto different experts look even when pooled.
    model = tiny_model("mixtral", num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1).train()
    with torch.no_grad():
        for i, view in enumerate(moe_layers(model)):
            view.router.weight.fill_(0)
            view.router.weight[i] = 1.0
            view.router.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))
    recorder = TrainingRecorder(model)
    model(input_ids=torch.randint(3, 384, (2, 10), generator=generator))
    values = recorder.drain()
    recorder.close()
    assert values["routing/max_violation"] == 1.0 and values["routing/dead_share"] == 0.5


def test_hooks_are_gone_after_training(tmp_path, generator):
    model = tiny_model("mixtral")
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    callback = ExpertLoadCallback()
    Trainer(model, arguments(tmp_path), train_dataset=rows(generator), callbacks=[callback]).train()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
    assert callback.recorder is None


def test_attached_callback_reaches_loggers_that_come_first(tmp_path, generator):
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    args = arguments(tmp_path, max_steps=1)
    trainer = Trainer(tiny_model("mixtral"), args, train_dataset=rows(generator), callbacks=[Logger()])
    ExpertLoadCallback().attach(trainer)
    trainer.train()
    assert seen[0].keys() >= KEYS


def test_evaluation_logs_stay_untouched(tmp_path, generator):
    trainer = Trainer(
        tiny_model("mixtral"),
        arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1),
        train_dataset=rows(generator),
        eval_dataset=rows(generator, count=2),
        callbacks=[ExpertLoadCallback()],
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations and not any(key.startswith("routing/") for entry in evaluations for key in entry)


def test_reentrant_checkpointing_is_reported_not_silent(tmp_path, generator, monkeypatch):
    model = tiny_model("mixtral")
    messages = []
    monkeypatch.setattr(
        "hf_moe.reporting.callback.logger.warning_once", lambda message: messages.append(message), raising=False
    )
    args = arguments(
        tmp_path,
        max_steps=1,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    Trainer(model, args, train_dataset=rows(generator), callbacks=[ExpertLoadCallback()]).train()
    assert len(messages) == 1 and "use_reentrant" in messages[0]


def test_dense_model_is_refused_when_training_begins(tmp_path, generator, tiny_llama):
    trainer = Trainer(tiny_llama, arguments(tmp_path), train_dataset=rows(generator), callbacks=[ExpertLoadCallback()])
    with pytest.raises(ValueError, match="has no MoE layer"):
        trainer.train()


def test_negative_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="`per_layer` must be 0 or more, got -1"):
        ExpertLoadCallback(per_layer=-1)


def test_drained_load_matches_the_frequency_of_the_balance_loss(generator):
    model = tiny_model("qwen3_moe").train()
    recorder = TrainingRecorder(model)
    outputs = model(input_ids=torch.randint(3, 384, (2, 10), generator=generator), output_router_logits=True)
    summary = recorder.stats.compute()
    recorder.close()
    for row, logits in enumerate(outputs.router_logits):
        frequency = expert_frequency(logits.topk(2).indices, 8)
        assert summary.load[row].tolist() == pytest.approx(frequency.tolist())
