import shutil

import pytest
import torch
from common.tiny_training import build, expert_lora, third_party_warnings, tiny_moe, tiny_upcycled
from transformers import TrainerCallback

from hf_moe.routing.steps import ROUTER_STATE_NAME


pytestmark = third_party_warnings

CONFIG = {
    "balance_mode": "lagged",
    "router_aux_loss_coef": 1.0,
    "router_z_loss_coef": 0.01,
    "router_type": "sigmoid_topk",
    "router_bias_update_speed": 0.05,
    "router_config": {
        "selection_bias": True,
        "noise": "gaussian",
        "schedules": {
            "temperature": {"type": "exponential", "start": 2.0, "end": 0.5, "num_steps": 0.8},
            "noise_std": {"type": "step", "at": 3, "before": 0.1, "after": 0.05},
        },
    },
}


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def run(kind, folder, lora, resume=None, callbacks=(), **config):
    adapter = expert_lora(target_modules=["q_proj"], modules_to_save=["gate"]) if lora else None
    trainer = build(
        kind,
        folder,
        tiny_moe(**{**CONFIG, **config}),
        data=10,
        lora=adapter,
        trainer={"callbacks": list(callbacks)},
        # An epoch has 4 + 4 + 2 micro-batches, so the run is resumed inside the second one.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        max_grad_norm=1.0,
        router_learning_rate=0.02,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state_of(trainer):
    state = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    state |= {name: tensor.clone() for name, tensor in trainer.model.named_buffers()}
    optimizer = trainer.optimizer.state_dict()["state"]
    state |= {f"optimizer.{i}.{key}": value for i, entry in optimizer.items() for key, value in entry.items()}
    return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An uninterrupted run and the folder of one that stopped after four steps, made once per kind."""
    made = {}

    def get(kind, lora):
        if (kind, lora) not in made:
            folder = tmp_path_factory.mktemp("runs")
            whole = run(kind, folder / "whole", lora)
            run(kind, folder / "part", lora, callbacks=[Stop(4)])
            made[kind, lora] = whole, folder / "part"
        return made[kind, lora]

    return get


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("kind", "lora"), [("trainer", False), ("trainer", True), ("sft", True), ("dpo", False)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(kind, lora, elsewhere, runs, tmp_path):
    whole, part = runs(kind, lora)
    shutil.copytree(part, tmp_path / "part")
    resume = True
    if elsewhere:
        resume = str(tmp_path / "moved")
        shutil.move(tmp_path / "part" / "checkpoint-4", resume)
    resumed = run(kind, tmp_path / "part", lora, resume=resume)
    assert resumed.state.global_step == 6
    assert resumed.announced == whole.announced[4:] == [4, 2]
    wanted, found = state_of(whole), state_of(resumed)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    keys = ("loss", "aux_loss", "router_z_loss", "learning_rate", "grad_norm")
    logs = [[{k: log[k] for k in keys} for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert logs[0] == logs[1]
    # What is compared has moved at all.
    moved = [name for name in wanted if name.endswith(("e_score_correction_bias", "previous_counts", "temperature"))]
    assert any("previous_counts" in name for name in moved)
    for name in moved:
        if "original_module" not in name:
            assert wanted[name].float().sub(2.0 if "temperature" in name else 0.0).abs().max() > 0, name


def test_the_state_of_the_routers_matters(runs, tmp_path):
    whole, part = runs("trainer", False)
    shutil.copytree(part, tmp_path / "part")
    (tmp_path / "part" / "checkpoint-4" / ROUTER_STATE_NAME).unlink()
    resumed = run("trainer", tmp_path / "part", False, resume=True)
    wanted, found = state_of(whole), state_of(resumed)
    assert any(not torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("make", [lambda: tiny_moe("moe_plus_plus", balance_mode="lagged"), tiny_upcycled])
def test_other_models_resume_too(make, tmp_path):
    def run(folder, resume=None, callbacks=()):
        options = {"balance_mode": "lagged", "router_aux_loss_coef": 1.0, "gradient_accumulation_steps": 2}
        options |= {"data": 12, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = build("sft", tmp_path / folder, make(), trainer={"callbacks": list(callbacks)}, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    run("part", callbacks=[Stop(2)])
    resumed = run("part", resume=True)
    wanted, found = state_of(whole), state_of(resumed)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


SCHEDULED = {
    "dense_to_sparse": {
        "temperature": {"type": "exponential", "start": 2.0, "end": 0.3, "num_steps": 0.5},
        "hard": {"type": "step", "at": 5},
    },
    "top_p": {"p": {"type": "linear", "start": 0.9, "end": 0.3, "num_steps": 6}},
    "comet": {"entropy_coef": {"type": "linear", "start": 0.0, "end": 0.5, "num_steps": 6}},
}


@pytest.mark.parametrize("router_type", SCHEDULED)
def test_routers_resume_in_the_middle_of_their_schedules(router_type, tmp_path):
    config = {
        "router_type": router_type,
        "router_config": {"schedules": SCHEDULED[router_type]},
        "router_bias_update_speed": 0.0,
    }
    whole = run("trainer", tmp_path / "whole", False, **config)
    run("trainer", tmp_path / "part", False, callbacks=[Stop(4)], **config)
    resumed = run("trainer", tmp_path / "part", False, resume=True, **config)
    expected, actual = state_of(whole), state_of(resumed)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert any(name.endswith(f".gate.{buffer}") for name in expected for buffer in SCHEDULED[router_type])
