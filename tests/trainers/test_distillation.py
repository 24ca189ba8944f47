"""Layer-wise distillation: the loss of the definition, a teacher that is left alone, and students that come closer."""

import copy
import json

import pytest
import torch
from common.tiny_training import SIZES, arguments, third_party_warnings, tiny_words, token_rows
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

from hf_moe import upcycle
from hf_moe.trainers import MoEDistillationConfig, MoEDistillationTrainer, hidden_state_discrepancy
from hf_moe.trainers import prediction_discrepancy as predictions_apart
from hf_moe.trainers.scripts import distillation as script
from hf_moe.upcycling import ImportanceShared


pytestmark = third_party_warnings
DENSE = {name: value for name, value in SIZES.items() if name not in ("num_experts", "router_aux_loss_coef")}
DENSE["intermediate_size"] = 64
KINDS = {
    "bert": (BertForSequenceClassification, BertConfig, {"num_labels": 3}),
    "bert_mlm": (BertForMaskedLM, BertConfig, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
}
QUIET = {"attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def teacher(kind="bert", seed=0, **changes):
    model_class, config_class, extra = KINDS[kind]
    quiet = {name: value for name, value in QUIET.items() if hasattr(config_class(), name)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config_class(**{**DENSE, **extra, **quiet, **changes}))


def student(dense, exact=False, **changes):
    """A mixture made from the teacher: its function, or a quarter of its channels in each expert."""
    split = {} if exact else {"experts": ImportanceShared(8, "contribution", width=16)}
    text = torch.randint(3, 128, (4, 10), generator=torch.Generator().manual_seed(5))
    options = {"num_experts": 4, "top_k": 1, "target": "moe_llama" if "llama" in dense.config.model_type else "auto"}
    moe, _ = upcycle(dense, **options, calibration=text, check=False, router_aux_loss_coef=0.0, **split, **changes)
    return moe


def rows(kind="bert", count=8, seed=0):
    found = token_rows(count, seed)
    if kind == "bert":
        for row in found:
            row["labels"] = row["input_ids"][0] % 3
    return found


def trainer(folder, kind="bert", model=None, dense=None, data=None, **options):
    dense = teacher(kind) if dense is None else dense
    model = student(dense) if model is None else model
    args = arguments(MoEDistillationConfig, folder, **options)
    return MoEDistillationTrainer(model, args, teacher_model=dense, train_dataset=data or rows(kind))


def batch_of(run, size=4):
    return run.data_collator([run.train_dataset[i] for i in range(size)])


# -- the loss --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_weight", [0.0, 0.5])
def test_the_loss_is_the_tasks_plus_the_weighted_distance(kind, prediction_weight, tmp_path):
    run = trainer(tmp_path, kind, distillation_weight=3.0, prediction_weight=prediction_weight)
    batch = batch_of(run)
    run.model.train()
    loss = run.compute_loss(run.model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs = run.teacher_model.eval()(**inputs, output_hidden_states=True)
    ours = run.model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    assert not real.all()
    expected, layers = ours.loss, len(theirs.hidden_states)
    assert layers == len(ours.hidden_states) == 3
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        expected = expected + 3.0 * F.mse_loss(mine[real], other[real])
    if prediction_weight:
        p, q = ours.logits.softmax(-1), theirs.logits.softmax(-1)
        apart = 0.5 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
        expected = expected + 3.0 * prediction_weight * (apart.mean() if apart.dim() == 1 else apart[real].mean())
    torch.testing.assert_close(loss, expected)
    assert loss > ours.loss * 1.01


def test_a_student_that_computes_the_teacher_has_no_distance(tmp_path):
    dense = teacher()
    run = trainer(tmp_path, model=student(dense, exact=True), dense=dense, prediction_weight=1.0)
    run.model.train()
    run.compute_loss(run.model, batch_of(run))
    assert run._router_metrics["distillation_loss"][0] < 1e-9


def test_what_is_at_padding_makes_no_difference(tmp_path):
    run = trainer(tmp_path)
    run.model.train()
    batch = batch_of(run)
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)}
    torch.testing.assert_close(run.compute_loss(run.model, other), run.compute_loss(run.model, batch))


def test_weight_zero_and_evaluation_leave_the_loss_alone(tmp_path):
    run = trainer(tmp_path, distillation_weight=0.0)
    batch = batch_of(run)
    run.model.train()
    torch.testing.assert_close(run.compute_loss(run.model, batch), run.model(**batch).loss)
    run = trainer(tmp_path, distillation_weight=5.0)
    with torch.no_grad():
        expected = run.model.eval()(**batch).loss
    assert abs(run.evaluate(run.train_dataset.__class__(rows(count=4)))["eval_loss"] - expected.item()) < 1e-5
    assert not run._router_metrics


def test_router_losses_are_added_too(tmp_path):
    dense = teacher()
    model = student(dense, router_type="comet", router_config={"entropy_coef": 0.3})
    run = trainer(tmp_path, model=model, dense=dense, distillation_weight=0.0)
    run.model.train()
    batch = batch_of(run)
    loss = run.compute_loss(run.model, batch)
    plain = run.model.eval()(**batch).loss
    torch.testing.assert_close(loss, plain + run._router_metrics["router_penalty"][0])
    assert run._router_metrics["router_penalty"][0] > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_gives_the_gradients_of_one_large_batch(kind, tmp_path):
    dense, data, found = teacher(kind), rows(kind), []
    for size, steps in ((4, 1), (1, 4)):
        run = trainer(
            tmp_path, kind, dense=dense, data=data, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, learning_rate=0.1, optim="sgd", distillation_weight=2.0,
        )  # fmt: skip
        run.train()
        found.append({name: parameter.detach().clone() for name, parameter in run.model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# -- the teacher -----------------------------------------------------------------------------------------------------
def test_the_teacher_is_left_alone_and_not_saved(tmp_path):
    dense = teacher(hidden_dropout_prob=0.5).train()
    before = copy.deepcopy(dense.state_dict())
    run = trainer(tmp_path, dense=dense, model=student(dense), max_steps=2)
    first = run.run_teacher(batch_of(run)).hidden_states[-1]
    torch.testing.assert_close(run.run_teacher(batch_of(run)).hidden_states[-1], first)  # no dropout
    assert not first.requires_grad
    run.train()
    assert dense.training and all(p.requires_grad and p.grad is None for p in dense.parameters())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    run.save_model(tmp_path / "saved")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert reloaded.state_dict().keys() == run.model.state_dict().keys()
    batch = batch_of(run)
    torch.testing.assert_close(reloaded(**batch).logits, run.model.eval()(**batch).logits)


def test_a_teacher_that_does_not_fit_is_refused_at_once(tmp_path):
    moe = student(teacher())
    for changes, name in (
        ({"hidden_size": 32}, "`hidden_size` 32 and the student 16"),
        ({"num_hidden_layers": 3}, "`num_hidden_layers` 3 and the student 2"),
        ({"vocab_size": 64}, "`vocab_size` 64 and the student 128"),
    ):
        with pytest.raises(ValueError, match=f"`teacher_model` has {name}"):
            trainer(tmp_path, model=moe, dense=teacher(**changes))
    with pytest.raises(ValueError, match="`teacher_model` is the student itself"):
        trainer(tmp_path, model=moe, dense=moe)
    with pytest.raises(TypeError, match="`teacher_model` must be a transformers model, got str"):
        trainer(tmp_path, model=moe, dense="bert-base-uncased")
    with pytest.raises(ValueError, match="would drop the gradient of the distance"):
        trainer(tmp_path, model=moe, activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TypeError, match="`args` must be a MoEDistillationConfig, got TrainingArguments"):
        from transformers import TrainingArguments

        MoEDistillationTrainer(moe, arguments(TrainingArguments, tmp_path), teacher_model=teacher())


@pytest.mark.parametrize("name", ["distillation_weight", "prediction_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_bad_weights_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0 and finite, got"):
        arguments(MoEDistillationConfig, tmp_path, **{name: value})


def test_predictions_for_another_task_are_refused():
    with pytest.raises(
        ValueError, match=r"`logits` of the student has the shape \(2, 3\) and of the teacher \(2, 4\)"
    ):
        predictions_apart({"logits": torch.ones(2, 3)}, {"logits": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="needs outputs with one of"):
        predictions_apart({"last_hidden_state": torch.ones(2, 3)}, {})


def test_regression_and_answers_have_their_own_distance():
    one = {"logits": torch.tensor([[1.0], [2.0]])}
    assert predictions_apart(one, {"logits": torch.tensor([[2.0], [4.0]])}) == 2.5
    spans = {"start_logits": torch.tensor([[0.0, 1.0]]), "end_logits": torch.tensor([[1.0, 0.0]])}
    swapped = {"start_logits": spans["end_logits"], "end_logits": spans["start_logits"]}
    p = torch.tensor([0.0, 1.0]).softmax(-1)
    torch.testing.assert_close(predictions_apart(spans, swapped), ((p[1] - p[0]) * (p[1] / p[0]).log()))


def test_the_distance_is_a_sum_over_layers_and_a_mean_over_real_tokens():
    zeros, mask = torch.zeros(1, 3, 4), torch.tensor([[1, 1, 0]])
    far = torch.tensor([[[1.0] * 4, [3.0] * 4, [100.0] * 4]])
    assert hidden_state_discrepancy([zeros, zeros], [far, far], mask) == 10.0
    assert hidden_state_discrepancy([zeros.bfloat16()], [far.bfloat16()], mask).dtype == torch.float32


# -- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_students_come_closer_to_their_teachers(kind, checkpointing, tmp_path):
    run = trainer(
        tmp_path, kind, max_steps=25, per_device_train_batch_size=8, learning_rate=0.003, distillation_weight=5.0,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    run.train()
    distances = [entry["distillation_loss"] for entry in run.state.log_history if "distillation_loss" in entry]
    assert len(distances) == 25 and distances[-1] < 0.7 * distances[0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_mixed_precision_gives_about_the_same_distance(kind, tmp_path):
    dense, distances = teacher(kind), []
    for bf16 in (False, True):
        run = trainer(tmp_path, kind, dense=dense, bf16=bf16, distillation_weight=2.0)
        assert run.train().training_loss > 0
        distances.append(next(log["distillation_loss"] for log in run.state.log_history if "distillation_loss" in log))
    assert distances[1] == pytest.approx(distances[0], rel=0.05) and distances[1] != distances[0]


def test_checkpointing_gives_the_same_gradients(tmp_path):
    dense, gradients = teacher(), []
    for checkpointing in (False, True):
        run = trainer(tmp_path, dense=dense, distillation_weight=2.0)
        if checkpointing:
            run.model.activation_checkpointing_enable()
        run.model.train()
        run.compute_loss(run.model, batch_of(run)).backward()
        gradients.append({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_stock_trainer_takes_the_student_without_a_teacher(tmp_path):
    from transformers import TrainingArguments

    run = Trainer(student(teacher()), arguments(TrainingArguments, tmp_path), train_dataset=rows())
    assert run.train().training_loss > 0


# -- the script ------------------------------------------------------------------------------------------------------
def test_the_script_distils_from_folder_to_folder(tmp_path):
    dense = teacher(label2id={"no": 0, "yes": 1, "maybe": 2}, id2label={0: "no", 1: "yes", 2: "maybe"})
    for name, model in (("teacher", dense), ("student", student(dense))):
        model.save_pretrained(tmp_path / name)
        tiny_words().save_pretrained(tmp_path / name)
    lines = [{"text": f"w{3 + i} w{9 + i}", "label": ("no", "yes", "maybe")[i % 3]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        *("--model_name_or_path", tmp_path / "student", "--teacher_model_name_or_path", tmp_path / "teacher"),
        *("--dataset_name", tmp_path / "rows.jsonl", "--eval_split", "train", "--output_dir", tmp_path / "out"),
        *("--max_steps", 2, "--use_cpu", "--report_to", "none", "--distillation_weight", 2),
    ]
    script.main(*script.make_parser().parse_args_and_config(list(map(str, words)), fail_with_unknown_args=False))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.config.model_type == "moe_bert" and saved.config.id2label[2] == "maybe"
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 0


def test_the_script_knows_heads_by_their_names():
    assert script.head_name("MoeBertForMaskedLM") == "ForMaskedLM"
    assert script.head_name("GPT2LMHeadModel") == "ForCausalLM"
    with pytest.raises(ValueError, match="must be a model with a head, got the architecture 'MoeBertModel'"):
        script.head_name("MoeBertModel")
