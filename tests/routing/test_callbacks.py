import shutil

import pytest
import torch
from accelerate import Accelerator
from common.toy_moe import ToyMoeForCausalLM, toy_dataset, toy_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe.routing import GlobalBalanceCallback, LoadBalancer, RouterScheduleCallback
from hf_moe.routing import callbacks as callbacks_module
from hf_moe.routing.balance import normalize_counts
from hf_moe.routing.discovery import find_balancers
from hf_moe.routing.schedules import ExponentialSchedule, LinearSchedule, StepSchedule
from hf_moe.routing.steps import ROUTER_STATE_NAME, BalanceSteps, count_batch_tokens


class Observer(TrainerCallback):
    """Notes the balancer and the gradients right before every optimizer step."""

    def __init__(self):
        self.steps = []
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append((model.load_balancer.num_micro_batches.item(), model.load_balancer.micro_batch.item()))
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


class ObservingTrainer(Trainer):
    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GlobalBalanceCallback):
                callback.observe_batches(batches)
        return batches, num_items


def train(folder, model, dataset, callbacks=(), cls=Trainer, resume=None, **kwargs):
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01, "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
        **{**options, **kwargs},
    )
    trainer = cls(model, args, train_dataset=dataset, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def step_gradients(folder, model, dataset, batch_size, accumulation, cls=Trainer, balance=True):
    observer = Observer()
    callbacks = [GlobalBalanceCallback(), observer] if balance else [observer]
    train(
        folder,
        model,
        dataset,
        callbacks,
        cls,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    return observer.gradients[0]


@pytest.mark.parametrize(("cls", "pad"), [(Trainer, False), (ObservingTrainer, True)])
def test_accumulation_does_not_change_the_gradient(cls, pad, tmp_path):
    dataset = toy_dataset(8, pad=pad)
    big = toy_model(balance_mode="lagged", router_z_loss_coef=0.05)
    wanted = step_gradients(tmp_path, big, dataset, 8, 1, cls)
    small = toy_model(balance_mode="lagged", router_z_loss_coef=0.05)
    # The frequencies of the step itself, which micro-batches cannot know: now both losses are the same function.
    small.load_balancer.previous_counts.copy_(big.load_balancer.previous_counts)
    small.load_balancer.previous_num_tokens.fill_(1)
    found = step_gradients(tmp_path, small, dataset, 2, 4, cls)
    assert wanted["layers.0.gate.weight"].abs().max() > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-8, rtol=2e-5, msg=name)


def test_stock_trainer_without_any_callback_has_the_right_coefficient(tmp_path):
    # Equal rows: the frequencies of a micro-batch are those of the step, so `micro` is exact.
    dataset = [toy_dataset(1)[0]] * 8
    wanted = step_gradients(tmp_path, toy_model(), dataset, 8, 1, balance=False)
    found = step_gradients(tmp_path, toy_model(), dataset, 2, 4, balance=False)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-8, rtol=1e-5, msg=name)


def test_a_loss_without_scale_is_taken_accumulation_times(tmp_path):
    dataset = [toy_dataset(1)[0]] * 8
    gates = {}
    for coefficient, accumulation in ((0.0, 1), (0.1, 1), (0.1, 4)):
        model = toy_model(coefficient=coefficient)
        model.in_tree_scale = True
        gradients = step_gradients(tmp_path, model, dataset, 8 // accumulation, accumulation, balance=False)
        gates[coefficient, accumulation] = gradients["layers.1.gate.weight"]
    once, four_times = (gates[0.1, g] - gates[0.0, 1] for g in (1, 4))
    torch.testing.assert_close(four_times, 4 * once, atol=1e-6, rtol=1e-3)


def test_a_trainer_that_divides_by_accumulation_gets_scale_one(tmp_path):
    class PlainLossTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    dataset = [toy_dataset(1)[0]] * 8
    wanted = step_gradients(tmp_path, toy_model(), dataset, 8, 1)
    found = step_gradients(tmp_path, toy_model(), dataset, 2, 4, cls=PlainLossTrainer)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-8, rtol=1e-5, msg=name)


@pytest.mark.parametrize("cls", [Trainer, ObservingTrainer])
def test_last_step_of_an_epoch_may_be_shorter(cls, tmp_path):
    observer = Observer()
    model = toy_model(balance_mode="blend")
    train(
        tmp_path,
        model,
        toy_dataset(10),
        [GlobalBalanceCallback(), observer],
        cls,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=2,
        max_steps=-1,
    )
    assert observer.steps == [(4, 4), (4, 4), (2, 2)] * 2  # G as announced, micro-batches as counted
    assert model.load_balancer.previous_num_tokens.item() == 16


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def resumable(*extra):
    schedules = {"temperature": ExponentialSchedule(2.0, 0.5, num_steps=0.8), "noise_std": StepSchedule(2, 0.1, 0.0)}
    return [GlobalBalanceCallback(), RouterScheduleCallback(schedules), *extra]


@pytest.mark.parametrize("mode", ["lagged", "blend", "running"])
def test_resumed_training_equals_uninterrupted_training_bit_by_bit(mode, tmp_path):
    kwargs = {
        "max_steps": 7,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    config = {
        "balance_mode": mode,
        "router_type": "sigmoid_topk",
        "router_config": {"selection_bias": True, "noise": "gaussian"},
        "router_bias_update_speed": 0.05,
    }
    dataset = toy_dataset(10, pad=True)

    def model():
        return toy_model(**config)

    whole, part = model(), model()
    observer = Observer()
    train(tmp_path / "whole", whole, dataset, resumable(observer), **kwargs)
    train(tmp_path / "part", part, dataset, resumable(Stop(4)), **kwargs)
    resumed = model()
    resumed_observer = Observer()
    trainer = train(tmp_path / "part", resumed, dataset, resumable(resumed_observer), resume=True, **kwargs)
    assert trainer.state.global_step == 7
    assert resumed_observer.steps == observer.steps[4:]
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), (_, b) in zip(whole.named_buffers(), resumed.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    bias = resumed.layers[0].gate.e_score_correction_bias
    assert bias.abs().max() > 0


def test_without_the_saved_counters_a_lagged_run_warns_and_differs(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(callbacks_module.logger, "warning_once", said.append)
    kwargs = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    dataset = toy_dataset(12)
    whole = toy_model(balance_mode="lagged", coefficient=1.0)
    train(tmp_path, whole, dataset, [GlobalBalanceCallback()], **kwargs)
    checkpoint = tmp_path / "checkpoint-2"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(checkpoint, elsewhere)

    def resume(**callback):
        model = toy_model(balance_mode="lagged", coefficient=1.0)
        train(tmp_path, model, dataset, [GlobalBalanceCallback(**callback)], resume=str(elsewhere), **kwargs)
        return model.layers[0].gate.weight

    assert not torch.equal(resume(), whole.layers[0].gate.weight)
    assert "checkpoint-2" in said[0] and "resume_from_checkpoint=" in said[0]
    assert torch.equal(resume(resume_from_checkpoint=str(elsewhere)), whole.layers[0].gate.weight)


def test_checkpoints_hold_the_counters_beside_the_weights_not_in_them(tmp_path):
    model = toy_model(balance_mode="lagged")
    train(tmp_path, model, toy_dataset(8), [GlobalBalanceCallback()], save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    assert [p.name for p in checkpoint.iterdir() if "router_state" in p.name] == [ROUTER_STATE_NAME]
    assert not any("load_balancer" in name for name in model.state_dict())
    fresh = toy_model(balance_mode="lagged")
    BalanceSteps(fresh).load([tmp_path, checkpoint])
    assert torch.equal(fresh.load_balancer.previous_counts, model.load_balancer.previous_counts)
    assert fresh.load_balancer.previous_counts.sum() > 0
    reloaded = ToyMoeForCausalLM.from_pretrained(checkpoint)
    assert all(buffer.sum() == 0 for buffer in reloaded.load_balancer.buffers())


def test_a_truncated_or_foreign_router_state_is_refused(tmp_path):
    steps = BalanceSteps(toy_model(balance_mode="lagged"))
    path = steps.save(tmp_path)
    with pytest.raises(ValueError, match=r"Resume with the model that wrote it, or delete router_state"):
        BalanceSteps(toy_model(balance_mode="lagged", num_experts=6)).load([tmp_path])
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"router_state\.safetensors cannot be read .* Delete it"):
        steps.load([tmp_path])


def test_a_failed_save_leaves_no_file(tmp_path, monkeypatch):
    def half_written(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("hf_moe.routing.steps.save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        BalanceSteps(toy_model()).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_between_steps_does_not_change_training(tmp_path):
    found = []
    for evaluate in (False, True):
        model = toy_model(balance_mode="blend")
        extra = {"eval_strategy": "steps", "eval_steps": 1} if evaluate else {}

        class EvaluatingTrainer(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, eval_dataset=toy_dataset(6, seed=9), **kwargs)

        train(
            tmp_path,
            model,
            toy_dataset(12),
            [GlobalBalanceCallback()],
            EvaluatingTrainer,
            max_steps=3,
            gradient_accumulation_steps=2,
            **extra,
        )
        found.append([*model.parameters(), *model.load_balancer.buffers()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_selection_bias_follows_the_counts_of_the_step_in_every_mode(tmp_path):
    for mode in ("micro", "rank", "running", "lagged", "blend"):
        model = toy_model(
            balance_mode=mode, router_type="sigmoid_topk", coefficient=0.0, router_bias_update_speed=0.125
        )
        train(tmp_path, model, toy_dataset(8), [GlobalBalanceCallback()], gradient_accumulation_steps=4)
        counts = model.load_balancer.previous_counts
        assert counts.sum(-1).tolist() == [8 * 8 * 2] * 2  # rows * length * top-k
        biases = torch.stack([layer.gate.e_score_correction_bias for layer in model.layers])
        assert torch.equal(biases, 0.125 * torch.sign(32.0 - counts))
        assert biases.abs().max() > 0


def test_schedules_are_written_before_every_step(tmp_path):
    class Reader(TrainerCallback):
        def __init__(self):
            self.values = []

        def on_substep_end(self, args, state, control, model=None, **kwargs):
            self.values.append([layer.gate.temperature.item() for layer in model.layers])

    reader = Reader()
    schedule = RouterScheduleCallback({"temperature": LinearSchedule(2.0, 1.0, num_steps=1.0)})
    train(tmp_path, toy_model(), toy_dataset(16), [schedule, reader], gradient_accumulation_steps=2, max_steps=4)
    assert reader.values == [[2.0, 2.0], [1.75, 1.75], [1.5, 1.5], [1.25, 1.25]]


def test_schedules_may_come_from_the_config(tmp_path):
    description = {"temperature": {"type": "step", "at": 1, "before": 3.0, "after": 0.5}}
    model = toy_model(router_config={"schedules": description})
    train(tmp_path, model, toy_dataset(8), [RouterScheduleCallback()], max_steps=2)
    assert [layer.gate.temperature.item() for layer in model.layers] == [0.5, 0.5]


def test_a_schedule_for_a_buffer_no_router_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`schedules` has 'heat', but no router .* have \['temperature'\]"):
        train(tmp_path, toy_model(), toy_dataset(4), [RouterScheduleCallback({"heat": 1.0})])


def test_integer_and_boolean_buffers_get_whole_values():
    model = toy_model()
    gate = model.layers[1].gate
    gate.register_buffer("active", torch.tensor(4))
    gate.register_buffer("hard", torch.tensor(False))
    schedules = {"active": LinearSchedule(4, 1, num_steps=4), "hard": StepSchedule(at=2)}
    for step, expected in ((0, (4, False)), (1, (3, False)), (2, (2, True)), (9, (1, True))):
        callbacks_module.apply_schedules(model, schedules, step)
        assert (gate.active.item(), gate.hard.item()) == expected


def test_plain_accelerate_loop_counts_whole_steps():
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = toy_model(balance_mode="running")
    rows = toy_dataset(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    balance = BalanceSteps(model, accelerator)
    accelerator.register_for_checkpointing(balance)
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        seen.append(model.load_balancer.micro_batch.item())
        balance.step()
    assert seen == [1, 2, 1, 2, 1]  # the last batch synchronises alone
    assert model.load_balancer.previous_num_tokens.item() == 16
    assert model.load_balancer.num_micro_batches.item() == 2


def test_plain_loop_without_accelerate_counts_by_itself():
    model = toy_model(balance_mode="rank").train()
    balance = BalanceSteps(model, num_micro_batches=2)
    batch = {key: torch.stack([row[key] for row in toy_dataset(2)]) for key in ("input_ids", "labels")}
    totals = []
    for _ in range(4):
        model(**batch)
        totals.append(model.load_balancer.num_tokens.item())
        balance.step()
    assert totals == [16, 32, 16, 32]
    balance.close()
    model(**batch)
    assert model.load_balancer.num_tokens.item() == 0


def test_state_of_the_steps_round_trips_in_the_middle_of_a_step(generator):
    model = toy_model(balance_mode="running").train()
    steps = BalanceSteps(model, num_micro_batches=2)
    batch = {key: torch.stack([row[key] for row in toy_dataset(2)]) for key in ("input_ids", "labels")}
    model(**batch)
    other = BalanceSteps(toy_model(balance_mode="running"))
    other.load_state_dict(steps.state_dict())
    balancer = next(iter(other.balancers.values()))[0]
    assert torch.equal(balancer.counts, model.load_balancer.counts) and balancer.micro_batch == 1


def test_each_tower_has_its_own_balancer():
    towers = nn.ModuleDict({"text": toy_model(), "image": toy_model(num_experts=6), "head": nn.Linear(2, 2)})
    found = find_balancers(towers)
    assert list(found) == ["text.load_balancer", "image.load_balancer"]
    for name, (balancer, routers) in found.items():
        assert routers == [layer.gate for layer in towers[name.split(".")[0]].layers]
        assert balancer.num_experts == (routers[0].num_experts,) * 2


def test_a_balancer_around_another_keeps_its_own_routers():
    outer = toy_model()
    outer.image = toy_model(num_experts=6)
    found = find_balancers(outer)
    assert [len(routers) for _, routers in found.values()] == [2, 2]
    assert found["image.load_balancer"][1] == [layer.gate for layer in outer.image.layers]


def test_models_without_balancer_or_bias_are_refused():
    with pytest.raises(ValueError, match="Linear has no `LoadBalancer`"):
        BalanceSteps(nn.Linear(2, 2))
    model = toy_model()
    model.load_balancer = LoadBalancer([4, 4], bias_update_speed=0.1)
    with pytest.raises(ValueError, match=r"`router_bias_update_speed=0\.1` needs a router with selection bias"):
        BalanceSteps(model)


def test_tokens_of_batches_are_counted_as_models_count_them():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert count_batch_tokens([{"attention_mask": mask, "input_ids": mask}, {"input_ids": mask}]) == 3 + 6
    assert count_batch_tokens([{"inputs_embeds": torch.zeros(2, 3, 5)}]) == 6
    with pytest.raises(ValueError, match=r"cannot count the tokens of a batch with the keys \['pixels'\]"):
        count_batch_tokens([{"pixels": mask}])


def test_frequencies_of_a_step_describe_the_dataset(tmp_path):
    model = toy_model(balance_mode="running")
    train(tmp_path, model, toy_dataset(8), [GlobalBalanceCallback()], gradient_accumulation_steps=4, learning_rate=0.0)
    batch = {key: torch.stack([row[key] for row in toy_dataset(8)]) for key in ("input_ids", "labels")}
    whole = toy_model(balance_mode="running").train()
    whole.load_balancer.begin_step()
    whole(**batch)
    expected = normalize_counts(whole.load_balancer.counts)
    torch.testing.assert_close(normalize_counts(model.load_balancer.previous_counts), expected)
