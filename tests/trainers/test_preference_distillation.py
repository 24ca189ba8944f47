"""Preference distillation: DPO and its variants with a teacher as the reference."""

import copy
import math

import pytest
import torch
from common.tiny_llava import dense_llava, images, make_processor, moe_llava
from common.tiny_training import arguments, expert_lora, preferences, third_party_warnings, tiny_moe, tiny_words
from datasets import Dataset
from torch.nn import functional as F

from hf_moe.trainers import PreferenceDistillationConfig, PreferenceDistillationTrainer, kto_pair_loss
from hf_moe.trainers.teachers import OnDevice, check_teacher


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


def test_vocabularies_may_be_padded_to_different_sizes(tmp_path):
    student, teacher = tiny_moe(router_aux_loss_coef=0.0), tiny_moe(seed=1, vocab_size=160)  # the tokenizer knows 128
    trainer = build(tmp_path, student, teacher, learning_rate=0.0, per_device_train_batch_size=4,
                    train_sampling_strategy="sequential")  # fmt: skip
    trainer.train()
    chosen, rejected = log_ratios(student.eval(), teacher.eval(), next(iter(trainer.get_train_dataloader())))
    expected = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=2e-5)


@pytest.mark.parametrize("precompute", [False, True])
def test_a_teacher_without_the_tokens_is_refused_before_it_is_asked(tmp_path, precompute):
    with pytest.raises(
        ValueError, match=r"the tokenizer knows 128 tokens, but the vocabularies of .* have 128 and 64"
    ):
        build(tmp_path, tiny_moe(), tiny_moe(seed=1, vocab_size=64), precompute_ref_log_probs=precompute)


def test_sharded_training_wants_no_device_for_the_teacher(tmp_path):
    trainer = build(tmp_path, tiny_moe(), tiny_moe(seed=1))
    trainer.is_deepspeed_enabled, trainer.args.teacher_device = True, "cpu"
    trainer._teacher_is_placed = False  # as before it was asked for the first time
    with pytest.raises(ValueError, match=r"`teacher_device='cpu'`: FSDP and DeepSpeed shard the teacher"):
        trainer._place_teacher()
    assert not isinstance(trainer.ref_model, OnDevice)


def test_sizes_of_vocabularies_are_known_where_zero_3_keeps_the_rows_elsewhere():
    student, teacher = tiny_moe(), tiny_moe(seed=1, vocab_size=160)
    for model in (student, teacher):  # what ZeRO-3 makes of a parameter
        weight = model.lm_head.weight
        weight.ds_shape = weight.shape
        weight.data = torch.empty(0)
    assert check_teacher(student, teacher, 128) == 128


def test_adapters_are_trained_against_the_teacher(tmp_path):
    student, teacher = tiny_moe(router_aux_loss_coef=0.0), tiny_moe(seed=1)
    losses = []
    for lora in (None, expert_lora()):  # adapters start as nothing: the loss is that of the student and the teacher
        args = arguments(PreferenceDistillationConfig, tmp_path, learning_rate=0.0)
        options = {"train_dataset": preferences(4), "processing_class": tiny_words(), "peft_config": lora}
        trainer = PreferenceDistillationTrainer(
            copy.deepcopy(student), args=args, teacher_model=copy.deepcopy(teacher), **options
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and abs(losses[0] - math.log(2)) > 1e-3


# -- images ------------------------------------------------------------------------------------------------------
def pictured(count: int) -> Dataset:
    def say(role, text, image=False):
        return [{"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}]

    answers = {"chosen": say("assistant", "the river runs past"), "rejected": say("assistant", "three cats")}
    rows = [{"prompt": say("user", f"what is in {i}?", True), "images": [image], **answers}
            for i, image in enumerate(images(count))]  # fmt: skip
    return Dataset.from_list(rows)


def picture_trainer(folder, tokenizer, teacher_seed=1, **options):
    processor = make_processor(tokenizer)
    size = len(processor.tokenizer)
    student = moe_llava(text={"vocab_size": size}, router_aux_loss_coef=0.0)
    student.config.image_token_index = processor.image_token_id
    # Of another architecture, with a vocabulary padded further.
    teacher = dense_llava("qwen2", teacher_seed, vocab_size=size, hidden_size=48)
    teacher.resize_token_embeddings(size + 5)
    teacher.config.image_token_index = processor.image_token_id
    args = arguments(PreferenceDistillationConfig, folder, max_length=None, **options)
    return PreferenceDistillationTrainer(
        student, args=args, teacher_model=teacher, train_dataset=pictured(4), eval_dataset=pictured(2),
        processing_class=processor,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto_pair"])
def test_a_teacher_of_images_is_the_same_asked_before_and_while_training(tmp_path, tiny_tokenizer_dir, loss_type):
    from transformers import AutoTokenizer

    found = []
    for precompute in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
        options = {"loss_type": [loss_type], "learning_rate": 0.01, "max_steps": 2, "seed": 3}
        trainer = picture_trainer(tmp_path, tokenizer, precompute_ref_log_probs=precompute, **options)
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        later = trainer.evaluate({"new": pictured(3)})["eval_new_loss"]  # rows the teacher has not seen
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert trainer.args.precompute_ref_log_probs is precompute
        found.append([evaluated, *losses, later])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert abs(found[0][0] - (math.log(2) if loss_type == "sigmoid" else 0.5)) > 1e-3


def test_streamed_images_cannot_be_asked_about_beforehand(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(globals(), "pictured", lambda count, make=pictured: make(count).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"needs a `datasets.Dataset`, got a IterableDataset"):
        picture_trainer(tmp_path, tiny_tokenizer, precompute_ref_log_probs=True)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`sync_ref_model` must be False"):
        arguments(PreferenceDistillationConfig, tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match=r"`label_smoothing=0\.1` has no meaning with"):
        arguments(PreferenceDistillationConfig, tmp_path, loss_type=["kto_pair"], label_smoothing=0.1)
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
