"""Preference distillation: DPO and its variants with a teacher as the reference."""

import copy
import math

import pytest
import torch
from common.tiny_training import arguments, preferences, third_party_warnings, tiny_moe, tiny_words
from torch.nn import functional as F

from hf_moe.trainers import PreferenceDistillationConfig, PreferenceDistillationTrainer, kto_pair_loss


pytestmark = third_party_warnings

PI = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -15.0])
REF = torch.tensor([-11.0, -12.5]), torch.tensor([-10.5, -13.0])


def build(folder, student, teacher, **options):
    args = arguments(PreferenceDistillationConfig, folder, **options)
    return PreferenceDistillationTrainer(
        student, args=args, teacher_model=teacher, train_dataset=preferences(4), processing_class=tiny_words()
    )


def log_ratios(student, teacher, batch):
    """Sums of log-probabilities of the answers, student minus teacher, chosen and rejected."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    sums = []
    for model in (student, teacher):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        sums.append(picked.masked_fill(labels == -100, 0).sum(-1))
    return (sums[0] - sums[1]).chunk(2)


def test_the_pair_loss_has_the_values_of_the_formula():
    chosen, rejected = PI[0] - REF[0], PI[1] - REF[1]
    losses = kto_pair_loss(chosen, rejected, beta=0.1)
    assert losses.tolist() == pytest.approx([0.4750, 0.4875, 0.4688, 0.4317], abs=5e-5)
    assert losses.mean().item() == pytest.approx(0.4657, abs=5e-5)
    dpo = -F.logsigmoid(0.1 * (chosen - rejected))
    assert dpo.tolist() == pytest.approx([0.6210, 0.5759], abs=5e-5)


@pytest.mark.parametrize(("loss_type", "value"), [("sigmoid", math.log(2)), ("kto_pair", 0.5)])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_a_student_that_is_its_teacher_starts_at_the_known_value(tmp_path, loss_type, value, beta):
    student = tiny_moe(router_aux_loss_coef=0.0)
    trainer = build(tmp_path, student, copy.deepcopy(student), loss_type=[loss_type], beta=beta, learning_rate=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto_pair"])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_teacher_is_the_reference(tmp_path, loss_type, precompute):
    student, teacher = tiny_moe(router_aux_loss_coef=0.0), tiny_moe("moe_plus_plus", seed=1)
    trainer = build(
        tmp_path, student, teacher, loss_type=[loss_type], precompute_ref_log_probs=precompute, learning_rate=0.0,
        per_device_train_batch_size=4, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = log_ratios(student.eval(), teacher.eval(), batch)
    expected = {
        "sigmoid": -F.logsigmoid(0.1 * (chosen - rejected)).mean(),
        "kto_pair": kto_pair_loss(chosen, rejected, 0.1).mean(),
    }
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected[loss_type].item(), abs=2e-5)
    assert log["rewards/margins"] == pytest.approx(0.1 * (chosen - rejected).mean().item(), abs=2e-5)


def test_router_losses_are_added_once(tmp_path):
    losses = []
    for coefficient in (0.0, 0.1):
        student = tiny_moe(router_aux_loss_coef=coefficient)
        trainer = build(tmp_path, student, copy.deepcopy(student), learning_rate=0.0)
        trainer.train()
        losses.append(trainer.state.log_history[0])
    assert losses[1]["loss"] - losses[0]["loss"] == pytest.approx(0.1 * losses[1]["aux_loss"], abs=1e-5)


def test_training_prefers_the_chosen_answers(tmp_path):
    student, teacher = tiny_moe(), tiny_moe(seed=1)
    trainer = build(
        tmp_path, student, teacher, max_steps=10, learning_rate=1e-2, logging_steps=1, loss_type=["kto_pair"]
    )
    trainer.train()
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    assert margins[-1] > margins[0]
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_may_run_on_a_device_of_its_own(tmp_path):
    student, teacher = tiny_moe(router_aux_loss_coef=0.0), tiny_moe(seed=1)
    found = []
    for device in (None, "cpu"):
        trainer = build(
            tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), teacher_device=device, learning_rate=0.0
        )
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'kto_pair' cannot be mixed with other losses"):
        arguments(PreferenceDistillationConfig, tmp_path, loss_type=["kto_pair", "sigmoid"])
    with pytest.raises(ValueError, match=r"`ld_alpha=0\.5` has no meaning with"):
        arguments(PreferenceDistillationConfig, tmp_path, loss_type=["kto_pair"], ld_alpha=0.5)
    student, teacher = tiny_moe(), tiny_moe(seed=1)
    options = {"args": arguments(PreferenceDistillationConfig, tmp_path), "train_dataset": preferences(2)}
    with pytest.raises(ValueError, match="`ref_model` is the teacher here"):
        PreferenceDistillationTrainer(student, teacher_model=teacher, ref_model=teacher, **options)
    with pytest.raises(ValueError, match="`teacher_model` is `model` itself"):
        PreferenceDistillationTrainer(student, teacher_model=student, **options)
