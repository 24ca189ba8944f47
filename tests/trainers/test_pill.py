"""PILL's two stages: what trains when, also after resuming, and the learning rates."""

import math

import pytest
import torch
from common.adapter_cases import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe import PillConfig
from hf_moe.trainers import PillStageCallback, pill_learning_rate, pill_schedule


IDS = torch.tensor([[5, 60, 60, 8, 9, 10], [9, 3, 2, 60, 60, 11]])
ROWS = [{"input_ids": ids, "labels": ids.masked_fill(ids == 60, -100)} for ids in IDS]


class Notes(TrainerCallback):
    """Weights of each container before each step, and the stage in it."""

    def __init__(self):
        self.stages, self.weights = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.stages.append(model.peft_config["default"].stage)
        self.weights.append(weights(model))


def weights(model):
    found = {}
    for name, parameter in model.named_parameters():
        if "hfmoe_pill_" in name:
            container = name.split("hfmoe_pill_")[1].split(".")[0]
            found.setdefault(container, []).append(parameter.detach().clone().flatten())
    return {container: torch.cat(values) for container, values in found.items()}


def model_with_pill(**fields):
    base = tiny_llama()
    torch.manual_seed(0)
    return get_peft_model(base, PillConfig(r=4, modality_token_ids={"image": 60}, **fields))


def train(folder, callback, model=None, steps=6, resume=None, optimizers=(None, None), **settings):
    model = model or model_with_pill()
    notes = Notes()
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        per_device_train_batch_size=2, lr_scheduler_type="constant", weight_decay=0.1,
        **({"save_strategy": "no"} | settings),
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=ROWS,
        callbacks=[notes, *([callback] if callback else [])],
        optimizers=optimizers,
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, notes


def test_only_the_other_modalities_adapters_train_first_and_everything_after(tmp_path):
    start = weights(model_with_pill())
    _, notes = train(tmp_path, PillStageCallback(3))
    assert notes.stages == ["align"] * 3 + ["instruct"] * 3
    for container, value in notes.weights[2].items():
        assert torch.equal(value, start[container]) == (container != "modality"), container
    for container, value in notes.weights[5].items():
        assert not torch.equal(value, notes.weights[2][container]), container


@pytest.mark.parametrize(("epochs", "expected"), [(2, 2), (0, 0), (2.4, 2), (100, 6)])
def test_the_first_stage_may_be_given_in_epochs(tmp_path, epochs, expected):
    _, notes = train(tmp_path, PillStageCallback(align_epochs=epochs), steps=-1, num_train_epochs=6)
    assert notes.stages == ["align"] * expected + ["instruct"] * (6 - expected)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, _ = train(tmp_path / "a", PillStageCallback(4), save_strategy="steps", save_steps=3)
    for step, stages in ((3, ["align", "instruct", "instruct"]), (6, [])):
        folder = str(tmp_path / "a" / f"checkpoint-{step}")
        again, notes = train(tmp_path / f"b{step}", PillStageCallback(4), resume=folder)
        assert notes.stages == stages
        for container, value in weights(again).items():
            torch.testing.assert_close(value, weights(whole)[container], rtol=1e-5, atol=1e-7)


def test_an_optimizer_that_lacks_parameters_is_found_out(tmp_path):
    model = model_with_pill(stage="align")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="The optimizer lacks"):
        train(tmp_path, PillStageCallback(1), model, optimizers=(optimizer, None))


def test_models_without_such_an_adapter_are_refused(tmp_path):
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"needs a PEFT model with a PILL adapter of that name, got PeftModel"):
        train(tmp_path, PillStageCallback(1), lora)
    with pytest.raises(ValueError, match="'other'"):
        train(tmp_path, PillStageCallback(1, adapter_name="other"))


@pytest.mark.parametrize("lengths", [{}, {"align_steps": 1, "align_epochs": 1.0}, {"align_steps": -1}])
def test_exactly_one_length_is_given(lengths):
    with pytest.raises(ValueError, match="Exactly one of `align_steps` and `align_epochs`"):
        PillStageCallback(**lengths)


def test_learning_rate_follows_the_batch():
    assert pill_learning_rate(1e-3, 256) == 1e-3
    assert pill_learning_rate(2e-3, 4 * 8) == 2.5e-4
    with pytest.raises(ValueError, match="`batch_size`"):
        pill_learning_rate(1e-3, 0)


def test_schedule_warms_up_and_falls_once_per_stage():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = pill_schedule(optimizer, 4, 12, align_warmup=2, instruct_warmup=4, instruct_factor=2.0)
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    half = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0, 0.5, 1.0, 1.5, *(2 * value for value in half)])


@pytest.mark.parametrize("steps", [(5, 4, 0, 0), (2, 4, 3, 0), (2, 4, 0, 3), (-1, 4, 0, 0)])
def test_schedules_that_do_not_add_up_are_refused(steps):
    align, total, first, second = steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="`align_"):
        pill_schedule(optimizer, align, total, align_warmup=first, instruct_warmup=second)
