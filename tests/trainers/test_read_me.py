"""Read-ME's training: whose turn it is, what the router learns, and that runs resume in the middle of a round."""

import importlib
import json
import math
import shutil

import pytest
import torch
import yaml
from common.tiny_training import build, third_party_warnings, tiny_words, token_rows
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_moe import ReadMeForCausalLM, convert_to_readme
from hf_moe.trainers import ReadMeTrainer, ReadMeTrainingArguments, command
from hf_moe.trainers.read_me_schedule import ReadMeSchedule
from hf_moe.trainers.read_me_targets import bucketed_overlap, distillation_loss, mask_overlap


pytestmark = third_party_warnings

SIZES = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
OPTIONS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "rounds": 2,
    "router_steps": 2,
    "expert_steps": 3,
    "learning_rate": 0.01,
    "router_learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def pair():
    """The dense model and a function that makes a fresh conversion of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    generator = torch.Generator().manual_seed(0)
    domains = {name: torch.randint(low, low + 40, (2, 32), generator=generator) for low, name in ((3, "a"), (60, "b"))}
    domains["both"] = torch.randint(3, 128, (2, 32), generator=generator)
    return dense, lambda **options: convert_to_readme(dense, domains, check=False, multiple_of=1, **options)[0]


def make_trainer(pair, folder, rows=None, callbacks=(), model=None, teacher=True, **options):
    dense, convert = pair
    return ReadMeTrainer(
        convert() if model is None else model,
        ReadMeTrainingArguments(str(folder), **{**OPTIONS, **options}),
        teacher=dense if teacher else None,
        train_dataset=token_rows(20) if rows is None else rows,
        callbacks=list(callbacks),
    )


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Changes(TrainerCallback):
    """Which parameters each step moved."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])})


# -- schedule --------------------------------------------------------------------------------------------------------
def test_rounds_alternate_and_learning_rates_fall_as_cosines():
    schedule = ReadMeSchedule(rounds=2, router_steps=2, expert_steps=4, round_decay=0.8)
    assert schedule.total_steps == 12
    assert [schedule.stage(step).part[0] for step in range(13)] == list("rreeeerreeeee")
    assert [schedule.stage(step).round for step in (0, 5, 6, 11, 12, 30)] == [0, 0, 1, 1, 1, 1]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert [schedule.factor(step, "router") for step in range(6)] == pytest.approx([1.0, 0.5, 0, 0, 0, 0])
    assert [schedule.factor(step, "experts") for step in range(6)] == pytest.approx([0, 0, *cosine])
    assert schedule.factor(6, "router") == 0.8 and schedule.factor(8, "experts") == 0.8
    assert schedule.factor(12, "experts") == schedule.factor(12, "router") == 0


@pytest.mark.parametrize("steps", [(0, 3), (3, 0)])
def test_a_stage_can_be_left_out(steps):
    schedule = ReadMeSchedule(2, *steps)
    assert {schedule.stage(step).part for step in range(6)} == {"experts" if steps[1] else "router"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"router_steps": -1}, "`router_steps` must not be negative"),
        ({"router_steps": 0, "expert_steps": 0}, "are both 0, so nothing would train"),
        ({"round_decay": 0.0}, "`round_decay` must be above 0"),
        ({"max_steps": 11}, "`max_steps` must be at most the 10 steps of 2 rounds, got 11"),
        ({"distill_target": "hamming"}, r"`distill_target` must be one of \['overlap', 'bucketed'\], got 'hamming'"),
        ({"target_temperature": 0.0}, "`target_temperature` must be above 0"),
        ({"router_learning_rate": -1.0}, "`router_learning_rate` must not be negative"),
        ({"trained_parts": "some"}, "`trained_parts` must be"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ReadMeTrainingArguments(str(tmp_path), **{**OPTIONS, **options})


# -- targets ---------------------------------------------------------------------------------------------------------
MASKS = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]]).bool()


def test_overlaps_count_the_tokens_own_channels_that_an_expert_keeps():
    activations = torch.tensor([[-9.0, 1.0, 8.0, 0.5, -7.0, 0.1], [0.0, 0.1, 0.2, 4.0, 5.0, 6.0]])
    # own channels {0, 2, 4} and {3, 4, 5}
    assert mask_overlap(activations, MASKS).tolist() == [[2, 1, 2], [0, 1, 1]]
    product = F.one_hot(torch.tensor([[0, 2, 4], [3, 4, 5]]), 6).sum(1).float() @ MASKS.float().t()
    assert torch.equal(mask_overlap(activations, MASKS), product)


def test_buckets_weigh_the_more_active_channels_more():
    masks = torch.zeros(2, 10).bool()
    masks[0, [0, 1, 2]] = True
    masks[1, [0, 8, 9]] = True
    activations = -torch.arange(10, 0, -1.0)[None]  # the lower the channel, the larger |a|
    # channel c is in how many of the sets of the 9, 8, 6, 4, 2 top channels; channel 0 is everybody's
    counts = [5, 5, 4, 4, 3, 3, 2, 2, 1, 0]
    expected = torch.tensor([[counts[1] + counts[2], counts[8] + counts[9]]]) / 30
    torch.testing.assert_close(bucketed_overlap(activations, masks), expected)


def test_the_loss_is_the_divergence_from_the_softmax_of_standardised_overlaps():
    overlap = torch.tensor([[2.0, 1.0, 3.0], [4.0, 4.0, 4.0]])
    standard = torch.tensor([[0.0, -math.sqrt(1.5), math.sqrt(1.5)], [0.0, 0.0, 0.0]])
    for temperature in (1.0, 0.5):
        loss = distillation_loss(standard / temperature + 3.0, [overlap, overlap], temperature=temperature)
        torch.testing.assert_close(loss, torch.zeros(2), rtol=0, atol=1e-6)
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.0, 0.0]])
    p, q = logits.softmax(-1), standard.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1)  # KL(softmax(G) || softmax(o))
    torch.testing.assert_close(distillation_loss(logits, [overlap] * 3), 3 * expected)


def test_the_bucketed_loss_is_that_of_the_released_code():
    overlap, logits = torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([[1.0, 0.0, -1.0]])
    log_p = logits.log_softmax(-1)[0]
    hard = -(0.5 * log_p[0] + 0.5 * log_p.mean())  # label smoothing 0.5
    soft = -(torch.softmax(torch.tensor([1.0, -1.0, 0.0]), -1) * log_p).sum()
    expected = 0.75 * hard + 0.25 * soft
    torch.testing.assert_close(distillation_loss(logits, [overlap], "bucketed"), expected[None])


# -- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trained_parts", ["feed_forward", "all"])
def test_each_stage_moves_its_own_part_and_nothing_else(pair, tmp_path, trained_parts):
    changes = Changes()
    trainer = make_trainer(pair, tmp_path, callbacks=[changes], trained_parts=trained_parts)
    trainer.train()
    assert trainer.state.global_step == 10
    names = {name for name, _ in trainer.model.named_parameters()}
    router = {name for name in names if ".router." in name}
    feed_forward = {name for name in names - router if ".mlp." in name or "norm." in name}
    for step, moved in enumerate(changes.steps):
        if step % 5 < 2:
            assert moved and moved <= router
        else:
            assert not moved & router
            assert feed_forward <= moved and (moved == feed_forward or trained_parts == "all")
    assert (changes.steps[2] == names - router) == (trained_parts == "all")


def test_logs_say_what_each_stage_learns(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, trained_parts="all")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["round"] for entry in logs] == [0] * 5 + [1] * 5
    for step, entry in enumerate(logs):
        if step % 5 < 2:
            assert "lm_loss" not in entry and 0 <= entry["router_agreement"] <= 1
            assert entry["loss"] == pytest.approx(2 * entry["router_loss"], rel=1e-4)  # a sum over two layers
        else:
            assert "router_loss" not in entry and entry["loss"] == pytest.approx(entry["lm_loss"], rel=1e-4)


@pytest.mark.parametrize("target", ["overlap", "bucketed"])
def test_the_router_learns_the_overlaps(pair, tmp_path, target):
    options = {"rounds": 1, "router_steps": 40, "expert_steps": 0, "distill_target": target}
    trainer = make_trainer(pair, tmp_path, rows=token_rows(8), **options, per_device_train_batch_size=8)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "router_loss" in entry]
    assert logs[-1]["router_loss"] < 0.95 * logs[0]["router_loss"]
    assert logs[-1]["router_agreement"] > logs[0]["router_agreement"] + 0.1


def test_expert_steps_reduce_the_language_model_loss(pair, tmp_path):
    options = {"rounds": 1, "router_steps": 0, "expert_steps": 20}
    trainer = make_trainer(pair, tmp_path, rows=token_rows(4), teacher=False, **options, per_device_train_batch_size=4)
    trainer.train()
    losses = [entry["lm_loss"] for entry in trainer.state.log_history if "lm_loss" in entry]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("stage", ["router", "experts"])
def test_accumulated_batches_give_the_gradients_of_one(pair, tmp_path, stage):
    steps = {"router_steps": 1, "expert_steps": 0} if stage == "router" else {"router_steps": 0, "expert_steps": 1}
    rows = token_rows(4, pad=False)
    moved = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            pair,
            tmp_path,
            rows=rows,
            rounds=1,
            **steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
            router_learning_rate=1.0,
        )
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        moved.append({name: p.detach() - start[name] for name, p in trainer.model.named_parameters()})
        names = ("router_loss", "lm_loss")
        logged = next(entry[name] for entry in trainer.state.log_history for name in names if name in entry)
        moved[-1]["logged"] = torch.tensor(logged)
    assert any(change.abs().max() > 1e-4 for change in moved[0].values())
    for other in moved[1:]:
        for name, change in moved[0].items():
            torch.testing.assert_close(other[name], change, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 8])
def test_a_run_resumes_in_the_middle_of_a_round_bit_by_bit(pair, tmp_path, stop):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    options["gradient_accumulation_steps"] = 2
    rows = token_rows(7)
    whole = make_trainer(pair, tmp_path / "whole", rows=rows, **options)
    whole.train()
    make_trainer(pair, tmp_path / "part", rows=rows, callbacks=[Stop(stop)], **options).train()
    assert (tmp_path / "part" / f"checkpoint-{stop}").is_dir()
    resumed = make_trainer(pair, tmp_path / "part", rows=rows, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 10
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    for ours, theirs in zip(resumed.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        assert ours["lr"] == theirs["lr"]
    shutil.rmtree(tmp_path)


def test_evaluation_is_by_the_language_model_loss(pair, tmp_path):
    rows = token_rows(4)
    trainer = make_trainer(pair, tmp_path)
    expected = make_trainer(pair, tmp_path, teacher=False, router_steps=0).evaluate(rows)["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_teacher_is_left_alone(pair, tmp_path):
    dense, _ = pair
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    dense.train()
    try:
        make_trainer(pair, tmp_path, rounds=1).train()
        assert dense.training and all(p.grad is None for p in dense.parameters())
    finally:
        dense.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert not dense.model.layers[0].mlp.down_proj._forward_pre_hooks


def test_a_saved_model_trains_on_and_checkpointing_works(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    pair[1]().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = make_trainer(pair, tmp_path, model=model, activation_checkpointing=True)
    plain = make_trainer(pair, tmp_path)
    trainer.train()
    plain.train()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_lora_with_a_trained_router(pair, tmp_path):
    from peft import LoraConfig, get_peft_model

    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    with pytest.raises(ValueError, match=r"frozen.*modules_to_save=\[\"router\"\]"):
        make_trainer(pair, tmp_path, model=get_peft_model(pair[1](), LoraConfig(r=2, **targets)))
    changes = Changes()
    tuned = get_peft_model(pair[1](), LoraConfig(r=2, modules_to_save=["router"], **targets))
    make_trainer(pair, tmp_path, model=tuned, callbacks=[changes], rounds=1).train()
    assert changes.steps[0] and all("modules_to_save" in name for name in changes.steps[0])
    assert changes.steps[2] and all("lora" in name for name in changes.steps[2])


@pytest.mark.parametrize(("kind", "stock"), [("trainer", False), ("trainer", True), ("sft", False), ("sft", True)])
def test_other_trainers_train_everything_but_the_router(pair, tmp_path, kind, stock):
    model, changes = pair[1](), Changes()
    trainer = build(kind, tmp_path, model, stock=stock, trainer={"callbacks": [changes]}, watch=False, max_steps=1)
    trainer.train()
    names = {name for name, _ in model.named_parameters()}
    assert changes.steps[0] == {name for name in names if ".router." not in name}


# -- refusals --------------------------------------------------------------------------------------------------------
def test_models_that_do_not_fit_are_refused(pair, tmp_path):
    dense, convert = pair
    with pytest.raises(ValueError, match="`teacher` must be the dense model that was converted, got NoneType"):
        make_trainer(pair, tmp_path, teacher=False)
    with pytest.raises(ValueError, match="`model` must be a `ReadMeForCausalLM`, got LlamaForCausalLM"):
        make_trainer(pair, tmp_path, model=dense)
    wider = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 48}))
    with pytest.raises(ValueError, match="has 48 channels in layer 0, but `model` was made from a model with 32"):
        make_trainer((wider, convert), tmp_path)
    with pytest.raises(ValueError, match="keep the same channels, so there is nothing to route"):
        make_trainer(pair, tmp_path, model=convert(keep=1.0))
    random = type(convert())(convert().config)
    with pytest.raises(ValueError, match=r"does not know which channels .*`mlp.channel_masks`"):
        make_trainer(pair, tmp_path, model=random)


# -- script ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(pair, tmp_path):
    """A dense and a converted model with a tokenizer, and text."""
    dense, convert = pair
    dense.save_pretrained(tmp_path / "dense")
    convert().save_pretrained(tmp_path / "model")
    for name in ("dense", "model"):
        tiny_words().save_pretrained(tmp_path / name)
    rows = [{"text": " ".join(f"w{3 + (7 * i + j) % 120}" for j in range(30))} for i in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**OPTIONS, "max_steps": 4, "block_length": 16}))
    return tmp_path


def run_script(folder, *more):
    script = importlib.import_module("hf_moe.trainers.scripts.read_me")
    paths = {"model_name_or_path": "model", "dataset_name": "text.jsonl", "output_dir": "out", "config": "run.yaml"}
    arguments = [word for key, path in paths.items() for word in (f"--{key}", str(folder / path))]
    script.main(*script.make_parser().parse_args_and_config([*arguments, *more], fail_with_unknown_args=False))


def test_the_script_trains_and_saves_a_model_that_loads(folder):
    run_script(folder, "--teacher_name_or_path", str(folder / "dense"))
    tuned, start = (ReadMeForCausalLM.from_pretrained(folder / name) for name in ("out", "model"))
    assert not torch.equal(tuned.model.router.head.weight, start.model.router.head.weight)
    with pytest.raises(ValueError, match="`--text_column words` is not in the data"):
        run_script(folder, "--text_column", "words")


def test_the_command_tells_its_arguments_from_those_of_the_launcher(folder):
    words = ["--config", str(folder / "run.yaml"), "--num_processes", "2", "--model_name_or_path", "m"]
    launch, script = command.split_arguments("read-me", [*words, "--dataset_name", "d", "--rounds", "3"])
    assert launch == ["--num_processes", "2"] and "--rounds" in script
