"""EvoMoE's two phases: one expert, then many, in one run that can be interrupted anywhere (2112.14397)."""

import importlib
import json

import pytest
import torch
import yaml
from common.tiny_families import tiny_model
from common.tiny_training import arguments, completions, third_party_warnings, tiny_moe, tiny_words, token_rows
from common.upcycling_toys import logit_gap, tiny_dense
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_moe import moe_layers
from hf_moe.trainers import EvoMoEConfig, EvoMoETrainingArguments, MoeTrainer, train_evomoe
from hf_moe.trainers.evomoe import with_one_expert


pytestmark = third_party_warnings

OPTIONS = {
    "max_steps": 8,
    "num_experts": 4,
    "expert_steps": 0.5,
    "temperature_steps": 3,
    "hard_after": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "router_aux_loss_coef": 0.1,
}


def args(folder, **options):
    return arguments(EvoMoETrainingArguments, folder, **{**OPTIONS, **options})


def one_expert():
    return tiny_moe(num_experts=1, num_experts_per_tok=1)


def run(folder, model=None, callbacks=(), **options):
    model = one_expert() if model is None else model
    return train_evomoe(model, args(folder, **options), train_dataset=token_rows(40), callbacks=list(callbacks))


class Watch(TrainerCallback):
    """Notes what a run does, and interrupts it."""

    def __init__(self, interrupt=None):
        self.rates, self.experts, self.gates, self.interrupt = {}, {}, {}, interrupt

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = state.global_step
        self.rates[step] = optimizer.param_groups[0]["lr"]
        self.experts[step] = moe_layers(model)[0].num_experts

    def on_step_end(self, args, state, control, model=None, **kwargs):
        router = moe_layers(model)[0].router
        self.gates[state.global_step - 1] = (round(router.temperature.item(), 4), bool(getattr(router, "hard", False)))
        if state.global_step == self.interrupt:
            raise KeyboardInterrupt


def test_both_phases_are_one_run_with_one_schedule(tmp_path):
    watch, reference = Watch(), Watch()
    trainer = run(tmp_path / "evomoe", callbacks=[watch])
    plain = MoeTrainer(one_expert(), args(tmp_path / "plain"), train_dataset=token_rows(40), callbacks=[reference])
    plain.train()
    assert watch.rates == reference.rates and list(watch.rates) == list(range(8))
    assert [watch.experts[step] for step in range(8)] == [1] * 4 + [4] * 4
    assert [watch.gates[step] for step in range(4, 8)] == [
        (2.0, False), (round(2.0 * (0.3 / 2.0) ** (1 / 3), 4), False), (round(2.0 * (0.3 / 2.0) ** (2 / 3), 4), False),
        (0.3, True),
    ]  # fmt: skip
    assert trainer.state.global_step == 8 and trainer.model.config.router_type == "dense_to_sparse"
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == list(range(1, 9))
    down = moe_layers(trainer.model)[0].experts.down_proj
    assert not torch.equal(down[0], down[1])


@pytest.mark.parametrize("interrupt", [3, 6])
def test_an_interrupted_run_goes_on_in_the_phase_it_was_in(tmp_path, interrupt):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", callbacks=[Watch(interrupt)])
    assert (tmp_path / "parts" / "phase2").exists() == (interrupt == 6)
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run\. Pass `resume_from_checkpoint=True`"):
        run(tmp_path / "parts")
    resumed = run(tmp_path / "parts", resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_phase_two_starts_where_phase_one_stopped(tmp_path):
    run(tmp_path, diversify="copy", gate_weights="gumbel")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "phase1" / "checkpoint-4")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "phase2" / "checkpoint-4").train()
    torch.manual_seed(0)
    assert logit_gap(before.eval(), after) < 4 * 0.001 * 10
    old, new = (
        torch.load(tmp_path / phase / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        for phase in ("phase1", "phase2")
    )
    assert all(torch.equal(old[key]["exp_avg"], new[key]["exp_avg"]) for key in old)  # expanded when it is loaded
    state = json.loads((tmp_path / "phase2" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["best_model_checkpoint"] is None


def test_experts_go_on_with_the_moments_of_the_one_they_come_from(tmp_path):
    class Moments(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 4:
                view = moe_layers(model)[0]
                self.expert = optimizer.state.get(view.experts.down_proj, {}).get("exp_avg")
                self.expert = None if self.expert is None else self.expert.clone()  # later steps write into it
                self.router = view.router.weight in optimizer.state

    for moments in ("copy", "reset"):
        seen = Moments()
        run(tmp_path / moments, callbacks=[seen], optimizer_moments=moments)
        assert not seen.router
        if moments == "reset":
            assert seen.expert is None
        else:
            assert seen.expert.shape[0] == 4 and seen.expert[0].any() and torch.equal(seen.expert[0], seen.expert[3])


def test_a_dense_model_becomes_one_expert_per_layer_that_computes_the_same():
    dense = tiny_dense("llama")
    model = with_one_expert(dense)
    assert model.config.model_type == "moe_llama" and [v.num_experts for v in moe_layers(model)] == [1, 1]
    assert logit_gap(dense, model) < 1e-5
    assert len(moe_layers(with_one_expert(dense, "every:2"))) == 1
    generic = with_one_expert(tiny_dense("gpt_neox"))
    assert generic.config.model_type == "upcycled_gpt_neox"


def test_a_few_steps_of_both_phases_reduce_the_loss(tmp_path):
    rows = token_rows(4, pad=False) * 8
    options = {
        "max_steps": 24,
        "save_steps": 24,
        "num_experts": 2,
        "per_device_train_batch_size": 4,
        "diversify_rate": 0.0,
    }
    trainer = train_evomoe(one_expert(), args(tmp_path, **options), train_dataset=rows)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[11] < 0.9 * losses[0] and losses[-1] < 0.9 * losses[11]


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, r"`max_steps` must be given \(at least 2\)"),
        ({"num_experts": 1}, "`num_experts` must be at least 2, got 1"),
        ({"expert_steps": 8}, "`expert_steps=8` gives phase 1 8 of 8 steps"),
        ({"expert_steps": 0.0}, "`expert_steps=0` gives phase 1 0 of 8 steps"),
        ({"temperature_schedule": "cosine"}, r"`temperature_schedule` must be one of .*got 'cosine'"),
        ({"temperature_end": 0.0}, "the schedule of `temperature`"),
        ({"temperature_steps": 0.0}, "`temperature_steps` must be above 0"),
        ({"hard_after": -1.0}, "`hard_after` must not be negative, got -1.0"),
        ({"optimizer_moments": "half"}, r"`optimizer_moments` must be one of \['copy', 'reset'\], got 'half'"),
        ({"gate_start": "ones"}, "`gate_start` must be one of"),
        ({"diversify": "shake"}, r"`method` must be one of .*got 'shake'"),
        ({"save_only_model": True}, "`save_only_model` must stay False"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_construction(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        args(tmp_path, **options)


def test_models_that_cannot_be_phase_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Phase 1 trains one expert per layer, but the model has \[4\]"):
        run(tmp_path, model=tiny_moe())
    with pytest.raises(ValueError, match="MixtralForCausalLM has routers of its own"):
        run(tmp_path, model=tiny_model("mixtral"))
    with pytest.raises(ValueError, match="`peft_config` must be None"):
        train_evomoe(one_expert(), args(tmp_path), peft_config=LoraConfig())
    assert not list(tmp_path.iterdir())


def test_a_run_is_resumed_with_its_own_arguments_only(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"`num_experts=8`, but the checkpoint .* has \[4\]"):
        run(tmp_path, num_experts=8, resume_from_checkpoint=True)


# -- script -----------------------------------------------------------------------------------------------------------
def test_the_script_trains_both_phases_and_saves_a_model_that_loads(tmp_path):
    tiny_dense("llama", vocab_size=128).save_pretrained(tmp_path / "model")
    tiny_words().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions(12)))
    options = {"max_steps": 4, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
               "activation_checkpointing": False, "per_device_train_batch_size": 2}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    words += ["--output_dir", str(tmp_path / "out"), "--config", str(tmp_path / "run.yaml")]
    words += ["--num_experts", "2", "--expert_steps", "0.5", "--temperature_steps", "1", "--max_active_experts", "2"]
    script = importlib.import_module("hf_moe.trainers.scripts.evomoe")
    parsed = script.make_parser().parse_args_and_config(words, fail_with_unknown_args=False)
    assert isinstance(parsed[1], EvoMoEConfig)
    script.main(*parsed)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "moe_llama" and model.config.num_experts == 2
    assert model.config.router_config["max_experts"] == 2
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
