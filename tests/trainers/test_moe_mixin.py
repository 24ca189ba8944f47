import copy

import pytest
import torch
from common.tiny_training import FAMILIES, arguments, build, expert_lora, third_party_warnings, tiny_moe, token_rows
from transformers import TrainerCallback

from hf_moe.routing import GlobalBalanceCallback, RouterScheduleCallback
from hf_moe.trainers import MoeTrainer, MoeTrainingArguments


pytestmark = third_party_warnings

SCHEDULES = {"schedules": {"temperature": {"type": "linear", "start": 2.0, "end": 1.0, "num_steps": 4}}}


def callbacks(trainer, cls):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, cls)]


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_callbacks_come_by_themselves(kind, tmp_path):
    class Temperatures(TrainerCallback):
        def __init__(self):
            self.values = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.values.append(model.moe_blocks()[1][1].gate.temperature.item())

    seen = Temperatures()
    model = tiny_moe(router_config=SCHEDULES)
    trainer = build(kind, tmp_path, model, trainer={"callbacks": [seen]}, max_steps=3)
    assert len(callbacks(trainer, GlobalBalanceCallback)) == len(callbacks(trainer, RouterScheduleCallback)) == 1
    trainer.train()
    assert seen.values == [2.0, 1.75, 1.5]


def test_callbacks_of_ones_own_are_kept(tmp_path):
    own = [GlobalBalanceCallback(), RouterScheduleCallback({"temperature": 3.0})]
    model = tiny_moe(router_config=SCHEDULES)
    trainer = build("trainer", tmp_path, model, trainer={"callbacks": own})
    assert callbacks(trainer, GlobalBalanceCallback) == own[:1]
    assert callbacks(trainer, RouterScheduleCallback) == own[1:]
    assert callbacks(build("trainer", tmp_path), RouterScheduleCallback) == []  # no schedules in the config
    trainer.train()
    assert model.moe_blocks()[0][1].gate.temperature == 3.0


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_last_step_of_an_epoch_may_have_fewer_micro_batches(kind, tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4}
    trainer = build(kind, tmp_path, data=10, per_device_train_batch_size=1, balance_mode="blend", **options)
    trainer.train()
    assert trainer.announced == [4, 4, 2, 4, 4, 2]
    tokens = [sum(int(batch["attention_mask"].sum()) for batch in step) for step in trainer.batches]
    assert trainer.model.base_model.load_balancer.previous_num_tokens == tokens[-1]


def test_logs_are_means_since_the_last_log(tmp_path):
    def logged(steps):
        options = {"data": 16, "max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": steps}
        trainer = build("trainer", tmp_path, balance_mode="running", router_z_loss_coef=0.01, **options)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert "aux_loss" not in trainer.state.log_history[-1]  # the summary, with nothing new to say
        return [(log["loss"], log["aux_loss"], log["router_z_loss"]) for log in logs]

    each, pairs = torch.tensor(logged(1)), torch.tensor(logged(2))
    torch.testing.assert_close(pairs, each.view(2, 2, 3).mean(1), atol=1e-6, rtol=1e-6)


def test_arguments_overrule_the_config_and_are_saved_with_the_model(tmp_path):
    model = tiny_moe(router_z_loss_coef=0.5)
    options = {"balance_mode": "lagged", "router_aux_loss_coef": 0.25, "router_z_loss_coef": 0.0}
    trainer = build("trainer", tmp_path, model, **options)
    trainer.train()
    assert model.base_model.load_balancer.mode == "lagged"
    assert "router_z_loss" not in trainer.state.log_history[0]
    trainer.save_model(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_without_arguments_the_config_holds(kind, tmp_path):
    model = tiny_moe(balance_mode="blend", router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    trainer = build(kind, tmp_path, model)
    balancer = model.base_model.load_balancer
    assert (balancer.mode, balancer.z_loss, model.config.router_aux_loss_coef) == ("blend", True, 0.3)
    trainer.train()
    assert {"aux_loss", "router_z_loss"} < trainer.state.log_history[0].keys()


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_trl_and_plain_arguments_do_as_well(kind, tmp_path):
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig

    from hf_moe.trainers import MoeSFTTrainer

    if kind == "trainer":
        trainer = MoeTrainer(tiny_moe(), arguments(TrainingArguments, tmp_path), train_dataset=token_rows(4))
    else:
        data, words = build("sft", tmp_path).train_dataset, build("sft", tmp_path).processing_class
        args = arguments(SFTConfig, tmp_path, router_aux_loss_coef=0.0)
        trainer = MoeSFTTrainer(tiny_moe(), args, train_dataset=data, processing_class=words)
        assert trainer.model.config.router_aux_loss_coef == 0.0
    assert isinstance(trainer, Trainer)
    trainer.train()
    assert ("aux_loss" in trainer.state.log_history[0]) == (kind == "trainer")


def test_a_model_made_anew_for_every_run_is_trained(tmp_path):
    made = []

    def model_init():
        made.append(tiny_moe())
        return made[-1]

    args = arguments(MoeTrainingArguments, tmp_path, balance_mode="running", max_steps=2)
    trainer = MoeTrainer(model_init=model_init, args=args, train_dataset=token_rows(4))
    trainer.train()
    first = trainer.state.log_history
    trainer.train()
    assert len(made) == 3 and made[-1].base_model.load_balancer.mode == "running"
    assert made[-1].base_model.load_balancer.previous_num_tokens > 0
    aux_losses = [
        [log["aux_loss"] for log in history if "loss" in log] for history in (first, trainer.state.log_history)
    ]
    assert aux_losses[0] == aux_losses[1]


def test_selection_biases_move_in_a_trl_trainer(tmp_path):
    model = tiny_moe(router_type="sigmoid_topk", router_bias_update_speed=0.125, router_aux_loss_coef=0.0)
    trainer = build("sft", tmp_path, model)
    trainer.train()
    biases = torch.stack([block.gate.e_score_correction_bias for _, block in model.moe_blocks()])
    counts = model.base_model.load_balancer.previous_counts
    assert torch.equal(biases, 0.125 * torch.sign(counts.float().mean(-1, keepdim=True) - counts))
    assert biases.abs().max() > 0


def test_selection_biases_beside_an_adapter_must_be_part_of_it(tmp_path):
    config = {"router_type": "sigmoid_topk", "router_bias_update_speed": 0.125}
    with pytest.raises(ValueError, match=r"`router_bias_update_speed=0\.125` moves .*modules_to_save=\[\"gate\"\]"):
        build("sft", tmp_path, tiny_moe(**config), lora=expert_lora())
    trainer = build("sft", tmp_path, tiny_moe(**config), lora=expert_lora(modules_to_save=["gate"]))
    trainer.train()
    gate = trainer.model.get_base_model().moe_blocks()[0][1].gate
    assert gate.modules_to_save["default"].e_score_correction_bias.abs().max() > 0
    assert gate.original_module.e_score_correction_bias.abs().max() == 0  # the reference of DPO
    assert trainer.gradients[0]["model.layers.0.mlp.gate.modules_to_save.default.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_aux_loss_coef": -0.1}, r"`router_aux_loss_coef` must not be negative, got -0\.1"),
        ({"router_z_loss_coef": -1.0}, r"`router_z_loss_coef` must not be negative, got -1\.0"),
        ({"balance_mode": "globl"}, r"`balance_mode` must be one of .*'lagged'.* got 'globl'"),
    ],
)
def test_bad_arguments_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build("trainer", tmp_path, **options)


def test_a_dense_model_is_refused(tmp_path, tiny_llama):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) has no MoE layer.*`hf_moe\.upcycle`"):
        build("trainer", tmp_path, tiny_llama)


def test_data_parallelism_in_one_process_is_refused(tmp_path):
    args = arguments(MoeTrainingArguments, tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"does not support `nn.DataParallel`.*accelerate launch"):
        MoeTrainer(tiny_moe(), args, train_dataset=token_rows(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_can_be_copied_and_pickled(family, tmp_path):
    model = tiny_moe(family)
    build("trainer", tmp_path, model, watch=False).train()
    ids = torch.arange(3, 11).view(1, 8)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)
