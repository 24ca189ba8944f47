"""Staged distillation: what the term is, that each token of a step counts once, and that it ends where it should."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from common.tiny_training import (
    VOCAB,
    arguments,
    completions,
    third_party_warnings,
    tiny_moe,
    tiny_words,
    token_rows,
)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_moe.trainers import (
    MoeSFTConfig,
    MoeSFTTrainer,
    MoeTrainer,
    MoeTrainingArguments,
    StagedDistillationConfig,
    StagedDistillationMixin,
    StagedDistillationTrainer,
)
from hf_moe.trainers.staged_distillation_config import StagedDistillationArguments


pytestmark = third_party_warnings


class NoteGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Plain(StagedDistillationMixin, Trainer):
    pass


@dataclass
class PlainArguments(StagedDistillationArguments, MoeTrainingArguments):
    pass


KINDS = {
    "trainer": (Plain, PlainArguments, MoeTrainer, MoeTrainingArguments, token_rows),
    "sft": (StagedDistillationTrainer, StagedDistillationConfig, MoeSFTTrainer, MoeSFTConfig, completions),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, folder, *, teacher=None, student=None, staged=True, rows=None, callbacks=(), **options):
    cls, config, plain_class, plain_config, data = KINDS[kind]
    student = tiny_moe(router_aux_loss_coef=0.0) if student is None else student
    kwargs = {"train_dataset": data(8) if rows is None else rows, "callbacks": list(callbacks)}
    if kind == "sft":
        kwargs["processing_class"] = tiny_words()
    if staged:
        kwargs["teacher_model"] = tiny_moe(seed=1) if teacher is None else teacher
    config, cls = (config, cls) if staged else (plain_config, plain_class)
    return cls(student, arguments(config, folder, **options), **kwargs)


def gradients(kind, folder, **options):
    note = NoteGradients()
    trainer = make(kind, folder, callbacks=[note], **options)
    trainer.train()
    return note.steps, trainer


def definition(student, teacher, batch, temperature=1.0):
    """Sum over labelled tokens of T^2 KL, written down again, and their number."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [model.eval()(**inputs).logits[:, :-1] / temperature for model in (student, teacher)]
    p, q = logits[1].softmax(-1), logits[0].softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1) * temperature**2
    counted = batch["labels"][:, 1:] != -100
    return divergence[counted].sum().item(), counted.sum().item()


# -- the term --------------------------------------------------------------------------------------------------------
@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_term_is_the_mean_over_tokens_of_the_divergence(kind, temperature, tmp_path):
    student, teacher = tiny_moe(router_aux_loss_coef=0.0), tiny_moe(seed=1, num_experts=2)
    before = copy.deepcopy(student)
    options = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make(
        kind, tmp_path, student=student, teacher=teacher, kd_temperature=temperature, kd_weight=0.5, **options
    )
    batches = []
    trainer.get_batch_samples = lambda *a, **k: _noted(batches, type(trainer).get_batch_samples(trainer, *a, **k))
    trainer.train()
    plain = make(kind, tmp_path, student=copy.deepcopy(before), staged=False, **options)
    plain.train()
    sums = [definition(before, teacher, batch, temperature) for batch in batches]
    expected = sum(total for total, _ in sums) / sum(number for _, number in sums)
    log, plain_log = trainer.state.log_history[0], plain.state.log_history[0]
    assert log["kd_loss"] == pytest.approx(expected, rel=1e-4) and expected > 0.05
    assert log["loss"] == pytest.approx(plain_log["loss"] + 0.5 * expected, rel=1e-4)


def _noted(batches, result):
    batches.extend(result[0])
    return result


@every_kind
def test_a_teacher_equal_to_the_student_adds_nothing(kind, tmp_path):
    student = tiny_moe(router_aux_loss_coef=0.0)
    teacher = copy.deepcopy(student)
    steps, trainer = gradients(kind, tmp_path, student=copy.deepcopy(student), teacher=teacher)
    plain, _ = gradients(kind, tmp_path, student=copy.deepcopy(student), staged=False)
    assert trainer.state.log_history[0]["kd_loss"] == pytest.approx(0.0, abs=1e-6)
    for name, gradient in plain[0].items():
        torch.testing.assert_close(steps[0][name], gradient, rtol=1e-4, atol=1e-6)


@every_kind
def test_accumulation_does_not_change_the_gradient(kind, tmp_path):
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        student = tiny_moe(router_aux_loss_coef=0.1, balance_mode="micro", expert_capacity_factor=None)
        student.config.router_aux_loss_coef = 0.0  # micro-batch statistics differ by design
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        steps, trainer = gradients(kind, tmp_path, student=student, kd_temperature=2.0, kd_weight=3.0, **sizes)
        found.append((steps[0], trainer.state.log_history[0]["kd_loss"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_teacher_may_be_of_another_family_and_padded(tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB + 8, **sizes))
    _, trainer = gradients("sft", tmp_path, teacher=teacher)
    assert trainer.state.log_history[0]["kd_loss"] > 0


# -- stages ----------------------------------------------------------------------------------------------------------
@every_kind
def test_after_the_stop_training_is_plain_bit_for_bit(kind, tmp_path):
    steps, trainer = gradients(kind, tmp_path / "a", max_steps=4, kd_stop_step=2)
    assert ["kd_loss" in log for log in trainer.state.log_history[:4]] == [True, True, False, False]
    never, _ = gradients(kind, tmp_path / "b", max_steps=4, kd_stop_step=0)
    plain, _ = gradients(kind, tmp_path / "c", max_steps=4, staged=False)
    for ours, theirs in zip(never, plain, strict=True):
        assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    # From the weights at the stop on, the same: only the first two steps differ.
    assert any(not torch.equal(steps[0][name], gradient) for name, gradient in plain[0].items())


@every_kind
def test_a_resumed_run_changes_stage_where_an_uninterrupted_one_does(kind, tmp_path):
    options = {
        "max_steps": 5,
        "kd_stop_step": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "constant",
    }
    whole = make(kind, tmp_path / "whole", **options)
    whole.train()
    make(kind, tmp_path / "parts", callbacks=[StopAt(2)], **options).train()
    resumed = make(kind, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    logs = [
        [("kd_loss" in log, log["loss"]) for log in t.state.log_history if "loss" in log] for t in (whole, resumed)
    ]
    assert logs[0] == logs[1] and [distils for distils, _ in logs[0]] == [True, True, True, False, False]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_evaluation_has_no_distillation_term(tmp_path):
    rows = completions(4)
    student = tiny_moe(router_aux_loss_coef=0.0)
    trainer = make("sft", tmp_path, student=student, rows=rows)
    plain = make("sft", tmp_path, student=student, rows=rows, staged=False)
    losses = [t.evaluate(t.train_dataset)["eval_loss"] for t in (trainer, plain)]
    assert losses[0] == losses[1]


# -- the teacher -----------------------------------------------------------------------------------------------------
@every_kind
def test_the_teacher_is_left_alone_and_not_saved(kind, tmp_path):
    teacher = tiny_moe(seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(kind, tmp_path, teacher=teacher, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["num_experts"] == 4 and not list((tmp_path / "saved").glob("*teacher*"))
    assert sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in trainer.model.parameters()
    )


def test_a_student_is_made_of_the_teacher(tmp_path):
    teacher = tiny_moe(seed=1, num_hidden_layers=4, num_experts=[2, 2, 4, 4])
    teacher.save_pretrained(tmp_path / "teacher")
    args = arguments(
        StagedDistillationConfig,
        tmp_path,
        teacher_model_name_or_path=str(tmp_path / "teacher"),
        student_drop_every=4,
    )
    trainer = StagedDistillationTrainer(args=args, train_dataset=completions(4), processing_class=tiny_words())
    assert trainer.model.config.num_hidden_layers == 3 and trainer.model.config.num_experts == [2, 4, 4]
    assert not torch.equal(trainer.model.lm_head.weight, teacher.lm_head.weight)
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_temperature": 0.0}, "`kd_temperature` must be above 0 and finite, got 0.0"),
        ({"kd_weight": -1.0}, "`kd_weight` must be at least 0 and finite, got -1.0"),
        ({"kd_stop_step": -2}, "`kd_stop_step` must be at least 0, or None .* got -2"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(StagedDistillationConfig, tmp_path, **options)


def test_unfit_models_are_refused(tmp_path):
    student = tiny_moe()
    with pytest.raises(ValueError, match="`teacher_model` is `model` itself"):
        make("sft", tmp_path, student=student, teacher=student)
    with pytest.raises(ValueError, match=r"tokenizer knows 128 tokens, .* vocabularies .* 128 and 64"):
        make("sft", tmp_path, teacher=tiny_moe(vocab_size=64))
    with pytest.raises(ValueError, match="has a vocabulary of 136 tokens, the student one of 128"):
        make("trainer", tmp_path, teacher=tiny_moe(vocab_size=136))
    with pytest.raises(ValueError, match="there is no teacher"):
        StagedDistillationTrainer(student, arguments(StagedDistillationConfig, tmp_path))
    with pytest.raises(ValueError, match="there is no student"):
        StagedDistillationTrainer(None, arguments(StagedDistillationConfig, tmp_path), teacher_model=tiny_moe())
    with pytest.raises(TypeError, match="`args` must be a StagedDistillationConfig"):
        StagedDistillationTrainer(student, arguments(MoeSFTConfig, tmp_path), teacher_model=tiny_moe(seed=1))


# -- it works --------------------------------------------------------------------------------------------------------
@every_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_approaches_its_teacher(kind, checkpointing, tmp_path):
    student = tiny_moe(num_experts=2)
    trainer = make(
        kind,
        tmp_path,
        student=student,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        kd_weight=2.0,
        activation_checkpointing=checkpointing,
    )
    trainer.train()
    losses = [log["kd_loss"] for log in trainer.state.log_history if "kd_loss" in log]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    assert all(log["aux_loss"] > 0 for log in trainer.state.log_history if "loss" in log)
