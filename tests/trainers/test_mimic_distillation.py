"""Mimic distillation: which positions, which weights, which models; text and images."""

import copy

import pytest
import torch
from common.tiny_llava import dense_llava, llava_inputs
from common.tiny_training import arguments, completions, third_party_warnings, tiny_moe, tiny_words
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from hf_moe import upcycle
from hf_moe.trainers import MimicDistillationConfig, MimicDistillationTrainer


pytestmark = third_party_warnings

SIZES = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}


def dense(seed=0, **changes):
    fields = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**fields))


def build(folder, student, teacher, rows=8, lora=None, **options):
    args = arguments(MimicDistillationConfig, folder, **options)
    return MimicDistillationTrainer(
        student,
        args=args,
        teacher_model=teacher,
        train_dataset=completions(rows),
        processing_class=tiny_words(),
        peft_config=lora,
    )


@torch.no_grad()
def expected(student, teacher, batch, on="response"):
    """KL and cross-entropy written out on whole logits, means over the positions that count."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    log_q = F.log_softmax(student(**inputs).logits[:, :-1].float(), dim=-1)
    log_p = F.log_softmax(teacher(**inputs).logits[:, :-1].float(), dim=-1)
    targets = batch["labels"][:, 1:]
    mask = targets != -100 if on == "response" else batch["attention_mask"][:, 1:].bool()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    return divergence, F.cross_entropy(log_q.flatten(0, 1), targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("on", ["response", "all"])
def test_the_loss_is_the_mean_divergence_over_what_is_distilled(tmp_path, on):
    student, teacher = dense(0), dense(1, hidden_size=32)
    trainer = build(tmp_path, student, teacher, kd_on=on, kd_chunk_size=3)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    divergence, _ = expected(student, teacher, batch, on)
    torch.testing.assert_close(loss, divergence)


def test_weights_and_temperature_enter_as_they_should(tmp_path):
    student, teacher = dense(0), dense(1)
    trainer = build(tmp_path, student, teacher, kd_weight=0.5, lm_weight=2.0)
    batch = next(iter(trainer.get_train_dataloader()))
    divergence, cross_entropy = expected(student, teacher, batch)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), 0.5 * divergence + 2 * cross_entropy)


def test_only_positions_before_labelled_tokens_matter(tmp_path):
    student, teacher = dense(0), dense(1)
    trainer = build(tmp_path, student, teacher)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([[-100, -100, 7, 8, -100]]),
    }

    def loss_with(positions):
        def change(_module, _args, output):
            changed = output.last_hidden_state.clone()
            changed[:, positions] += 1.0
            output.last_hidden_state = changed

        handle = teacher.base_model.register_forward_hook(change)
        value = trainer.compute_loss(trainer.model, dict(batch))
        handle.remove()
        return value.item()

    unchanged = loss_with([])
    assert loss_with([0, 3, 4]) == unchanged
    assert loss_with([1]) != unchanged and loss_with([2]) != unchanged


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    student = dense()
    trainer = build(tmp_path, student, copy.deepcopy(student), learning_rate=1e-5)
    before = copy.deepcopy(student.state_dict())
    trainer.train()
    assert trainer.state.log_history[0]["distillation_loss"] == pytest.approx(0, abs=1e-6)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=2e-5)  # Adam follows the sign of rounding


def test_right_after_upcycling_the_sparse_student_is_the_dense_one(tmp_path):
    student, teacher = dense(0), dense(1)
    moe, _ = upcycle(student, num_experts=4, top_k=2, target="moe_llama", check=False, router_aux_loss_coef=0.0)
    losses = []
    for model in (student, moe):
        trainer = build(tmp_path, model, teacher, kd_weight=1.0, lm_weight=0.0)
        losses.append(trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader())))))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_a_sparse_student_learns_labels_and_balance_too(tmp_path):
    student, teacher = tiny_moe(router_aux_loss_coef=0.01), dense(1)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.mlp.gate.weight.zero_()  # every expert has the same probability: the balance loss is 1 per layer
    trainer = build(tmp_path, student, teacher)
    assert trainer.lm_weight == 1.0
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    student.eval()
    divergence, cross_entropy = expected(student, teacher, batch)
    torch.testing.assert_close(loss - divergence - cross_entropy, torch.tensor(0.01), rtol=1e-3, atol=1e-5)


def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path):
    gradients = []
    for on in ("response", "all"):
        for size, steps in ((8, 1), (2, 4)):
            student, teacher = dense(0), dense(1)
            trainer = build(
                tmp_path, student, teacher, kd_on=on, lm_weight=0.5, per_device_train_batch_size=size,
                gradient_accumulation_steps=steps, max_steps=1, learning_rate=0.0, max_grad_norm=0.0,
                train_sampling_strategy="sequential",
            )  # fmt: skip
            kept = {}
            trainer.add_callback(_Keep(kept))
            trainer.train()
            gradients.append(kept)
    for one, other in ((0, 1), (2, 3)):
        for name, gradient in gradients[one].items():
            torch.testing.assert_close(gradient, gradients[other][name], rtol=1e-4, atol=1e-6)


def _Keep(kept):
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            kept.update({name: p.grad.clone() for name, p in model.named_parameters()})

    return Keep()


def test_the_teacher_is_frozen_and_not_saved(tmp_path):
    student, teacher = dense(0), dense(1).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = build(tmp_path, student, teacher, max_steps=3, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.num_parameters() == student.num_parameters()


@pytest.mark.parametrize("kind", ["dense", "moe", "lora"])
def test_training_brings_the_student_nearer(tmp_path, kind):
    student = tiny_moe() if kind == "moe" else dense(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if kind == "lora" else None
    rate = 1e-1 if kind == "lora" else 2e-2
    trainer = build(tmp_path, student, dense(1), lora=lora, max_steps=12, learning_rate=rate, logging_steps=1)
    trainer.train()
    found = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert found[-1] < found[0] - 0.1
    assert trainer.evaluate(completions(4))["eval_distillation_loss"] < found[0]


def test_vocabularies_may_be_padded_to_different_sizes(tmp_path):
    student, teacher = dense(0, vocab_size=136), dense(1)
    trainer = build(tmp_path, student, teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        log_q = F.log_softmax(student(**inputs).logits[:, :-1, :128], dim=-1)
        log_p = F.log_softmax(teacher(**inputs).logits[:, :-1], dim=-1)
    mask = batch["labels"][:, 1:] != -100
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), divergence)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(tmp_path):
    found = []
    for checkpointing in (False, True):
        student = tiny_moe()
        trainer = build(tmp_path, student, dense(1), gradient_checkpointing=checkpointing)
        if checkpointing:
            student.gradient_checkpointing_enable()
        loss = trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader()))))
        loss.backward()
        found.append((loss.detach(), student.model.layers[0].mlp.experts.down_proj.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_models_that_read_images_are_distilled(tmp_path):
    student, teacher = dense_llava(vocab_size=128), dense_llava("qwen2", 1, hidden_size=48, vocab_size=128)
    args = arguments(MimicDistillationConfig, tmp_path, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    inputs = llava_inputs(padding="right", image_token=127)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :6] = -100
    tensors = {**inputs, "labels": labels}
    rows = Dataset.from_list([{name: tensor[i].tolist() for name, tensor in tensors.items()} for i in (0, 1)])
    trainer = MimicDistillationTrainer(
        student,
        args=args,
        teacher_model=teacher,
        train_dataset=rows,
        data_collator=lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]},
        processing_class=tiny_words(),
    )
    batch = {**inputs, "labels": labels}
    divergence, _ = expected(student, teacher, batch)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), divergence)


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    student = dense()
    with pytest.raises(ValueError, match="`teacher_model` is `model` itself"):
        build(tmp_path, student, student)
    with pytest.raises(TypeError, match="`teacher_model` must be a transformers model"):
        build(tmp_path, student, 3)
    with pytest.raises(
        ValueError, match=r"the tokenizer knows 128 tokens, but the vocabularies of .* have 128 and 64"
    ):
        build(tmp_path, student, dense(1, vocab_size=64))
    llava = dense_llava()
    with pytest.raises(ValueError, match="only one reads images"):
        build(tmp_path, student, llava)
    with pytest.raises(ValueError, match="an image takes 4 tokens of the student and 16 of the teacher"):
        build(tmp_path, llava, dense_llava(vision={"patch_size": 4}))
    with pytest.raises(ValueError, match="`image_token_id` is 63 for the student and 31 for the teacher"):
        build(tmp_path, llava, dense_llava(vocab_size=32))


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_student_in_shards_is_refused(tmp_path, monkeypatch, kind):
    made = SFTTrainer.__init__

    def sharded(self, *args, **kwargs):
        made(self, *args, **kwargs)
        setattr(self, kind, True)

    monkeypatch.setattr(SFTTrainer, "__init__", sharded)
    with pytest.raises(ValueError, match=r"does not support FSDP and DeepSpeed.*accelerate launch --multi_gpu"):
        build(tmp_path, dense(), dense(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_on": "prompt"}, "`kd_on` must be 'response' or 'all', got 'prompt'"),
        ({"kd_weight": -1.0}, "`kd_weight` must be at least 0 and finite, got -1.0"),
        ({"kd_weight": 0.0, "lm_weight": 0.0}, "`kd_weight` and `lm_weight` are both 0"),
        ({"kd_temperature": 0.0}, "`kd_temperature` must be above 0 and finite, got 0.0"),
        ({"kd_chunk_size": 0}, "`kd_chunk_size` must be at least 1, got 0"),
        ({"packing": True}, "`packing=True` is not supported"),
    ],
)
def test_wrong_settings_are_refused_by_the_config(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(MimicDistillationConfig, tmp_path, **options)
